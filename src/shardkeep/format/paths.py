"""The paths of a structure as columns: each as the row of its container and of its last key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import numpy as np

from shardkeep.format.values import dumps, encode_key
from shardkeep.types import I64, Index, Path, Structure

__all__ = ["Paths", "names_of", "paths_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Paths:
    """C containers and L leaves, in the order of the structure.

    Attributes:
        keys: every key once; 1, True and 1.0 are different keys.
        containers: [C - 1] row of the container around each container except the root, which is row
            0; and [C - 1] row in `keys`.
        leaves: the same for each leaf, [L] and [L].
        names: [L] the row of each leaf's name.
    """

    keys: list[Any]
    containers: tuple[I64, I64]
    leaves: tuple[I64, I64]
    names: I64


def paths_of(structure: Structure, names: Sequence[str]) -> Paths:
    """Return the columns of a structure.

    Args:
        structure: any structure.
        names: the names of all leaves, and possibly others.

    Raises:
        ValueError: the structure has no root, a path without its container, or a leaf without a
            name; or containers do not come outer before inner.
        NotEncodable: a key cannot be encoded.
    """
    containers, leaves = list(structure.containers), list(structure.leaves.values())
    if containers[:1] != [()] or () in leaves:
        raise ValueError("the structure has no root, or a leaf at its root")
    try:
        outer, around = map(_column, structure.parents or _parents(containers, leaves))
        named = _rows(list(structure.leaves), names)
    except KeyError as error:
        raise ValueError(f"the structure names {error}, which is not there") from None
    marks = [
        key if type(key := path[-1]) is str else _mark(key)
        for path in chain(containers[1:], leaves)
    ]
    different = dict.fromkeys(marks)
    if len(different) == len(marks):
        key = np.arange(len(marks), dtype=np.int64)
    else:
        number = dict(zip(different, count(), strict=False))
        key = np.fromiter(map(number.__getitem__, marks), np.int64, len(marks))
    if (outer > np.arange(len(outer))).any():
        raise ValueError("the structure's containers do not come outer before inner")
    return Paths(
        [mark if type(mark) is str else mark[1] for mark in different],
        (outer, key[: len(outer)]),
        (around, key[len(outer) :]),
        named,
    )


def _column(rows: Sequence[int]) -> I64:
    return np.array(rows, np.int64)


def _parents(containers: Sequence[Path], leaves: Sequence[Path]) -> tuple[list[int], list[int]]:
    """Return `Structure.parents`; raise KeyError if one is missing."""
    rows = {path: row for row, path in enumerate(containers)}
    return [rows[path[:-1]] for path in containers[1:]], [rows[path[:-1]] for path in leaves]


def names_of(index: Index) -> tuple[str, ...]:
    """Return the names whose rows `paths_of` gives for an index: its tensors, then its objects."""
    return index.tensors.names + index.objects.names


def _rows(leaves: list[str], names: Sequence[str]) -> I64:
    if leaves == list(names):
        return np.arange(len(leaves))
    rows = {name: row for row, name in enumerate(names)}
    return np.array([rows[name] for name in leaves], np.int64)


def _mark(key: Any) -> tuple[Any, Any]:
    """Return the key, distinct from keys that are equal to it only for Python."""
    simple = type(key) is int or type(key) is bool or key is None
    return (type(key) if simple else dumps(encode_key(key))), key
