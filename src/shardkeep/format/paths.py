"""The paths of a structure as columns: each as the row of its container and of its last key."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardkeep.format.values import dumps, encode_key
from shardkeep.types import I64, Path, Structure

__all__ = ["Paths", "paths_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Paths:
    """C containers and L leaves, in the order of the structure.

    Attributes:
        keys: every key once; 1, True and 1.0 are different keys.
        containers: [C - 1] row of the container around each container but the root, which is row 0;
            and [C - 1] row in `keys`.
        leaves: the same of each leaf, [L] and [L].
    """

    keys: list[Any]
    containers: tuple[I64, I64]
    leaves: tuple[I64, I64]


def paths_of(structure: Structure) -> Paths:
    """The columns of a structure.

    Raises:
        ValueError: it has no root, or a path without its container; containers do not come outer
            before inner.
        NotEncodable: a key cannot be carried.
    """
    rows = {path: row for row, path in enumerate(structure.containers)}
    keys: dict[Any, int] = {}
    paths = list(rows)
    if paths[:1] != [()] or () in structure.leaves.values():
        raise ValueError("the structure has no root, or a leaf at its root")

    def columns(paths: Collection[Path]) -> tuple[I64, I64]:
        try:
            parents = [rows[path[:-1]] for path in paths]
        except KeyError as error:
            raise ValueError(f"the structure names {error}, which is not there") from None
        marks = [key if type(key := path[-1]) is str else _mark(key) for path in paths]
        for mark in marks:
            keys.setdefault(mark, len(keys))
        return np.array(parents, np.int64), np.array([keys[mark] for mark in marks], np.int64)

    containers, leaves = columns(paths[1:]), columns(structure.leaves.values())
    if (containers[0] > np.arange(len(containers[0]))).any():
        raise ValueError("the structure's containers do not come outer before inner")
    found = [mark if type(mark) is str else mark[1] for mark in keys]
    return Paths(found, containers, leaves)


def _mark(key: Any) -> tuple[Any, Any]:
    """The key, told apart from those that are equal to it for Python only."""
    simple = type(key) is int or type(key) is bool or key is None
    return (type(key) if simple else dumps(encode_key(key))), key
