"""What a checkpoint holds, as rows to list and as a tree of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import translate
from math import prod
from typing import NamedTuple

from shardkeep.checkpoint.reader import CheckpointReader
from shardkeep.types import DTYPES, DType, Path, Structure

__all__ = ["Node", "Row", "matching", "rows", "tree"]

_DEEPEST = 200
"""Keys of a path that become levels of the tree; as many as `shardkeep.state.flatten` walks."""


class Row(NamedTuple):
    """A tensor, an object, or a container that holds nothing (only tensors have the last three)."""

    name: str
    path: Path
    kind: str
    """"tensor", "object", "empty dict", "empty list" or "empty OrderedDict"."""
    dtype: DType | None = None
    shape: tuple[int, ...] = ()
    nbytes: int = 0


def rows(checkpoint: CheckpointReader) -> list[Row]:
    """Everything in a checkpoint, in the order of its state. Reads the outline only."""
    outline = checkpoint.outline
    leaves = outline.structure.leaves if outline.structure else {}
    nested = outline.structure is not None
    tensors = outline.tensors
    found: dict[str, Row] = {}

    def path(name: str) -> Path:
        return leaves.get(name, (name,)) if nested else tuple(name.split("."))

    for name, code, ndim, padded in zip(
        tensors.names,
        tensors.dtype.tolist(),
        tensors.ndim.tolist(),
        tensors.shape.tolist(),
        strict=True,
    ):
        dtype, shape = DTYPES[code], tuple(padded[:ndim])
        found[name] = Row(name, path(name), "tensor", dtype, shape, prod(shape) * dtype.itemsize)
    for name in outline.objects.names:
        if name not in outline.legacy_duplicates:
            found[name] = Row(name, path(name), "object")
    if outline.structure is None:
        return list(found.values())
    return [*_ordered(found, outline.structure), *found.values()]


def _ordered(found: dict[str, Row], structure: Structure) -> Iterator[Row]:
    """Rows in the state's order, taken out of `found`, with what holds nothing at its place."""
    empties = sorted(structure.empties.items(), key=lambda item: item[1], reverse=True)

    def until(count: int) -> Iterator[Row]:
        while empties and empties[-1][1] <= count:
            path, _ = empties.pop()
            if path:
                kind = structure.containers.get(path, "dict")
                yield Row(".".join(map(str, path)), path, f"empty {kind}")

    for count, name in enumerate(structure.leaves):
        if empties:
            yield from until(count)
        if name in found:
            yield found.pop(name)
    yield from until(len(structure.leaves))


def matching(all_rows: Sequence[Row], pattern: str) -> list[Row]:
    """Rows of that name, below that name, or whose whole name fits that shell pattern."""
    fits = re.compile(translate(pattern)).match
    prefix = pattern + "."
    return [
        row
        for row in all_rows
        if row.name == pattern or row.name.startswith(prefix) or fits(row.name)
    ]


class Node:
    """A place in the tree: the rows that are there (one, mostly), and what is below it."""

    __slots__ = ("below", "rows")

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.below: dict[object, Node] = {}

    def all(self) -> Iterator[Row]:
        """Every row from here on."""
        rest = [self]
        while rest:
            node = rest.pop()
            yield from node.rows
            rest += node.below.values()


def tree(some: Sequence[Row]) -> Node:
    """Rows by their paths. What is nested deeper than any state stands under its whole name."""
    root = Node()
    for row in some:
        node = root
        path = row.path if 0 < len(row.path) <= _DEEPEST else (row.name,)
        for key in path:
            inner = node.below.get(key)
            if inner is None:
                inner = node.below[key] = Node()
            node = inner
        node.rows.append(row)
    return root
