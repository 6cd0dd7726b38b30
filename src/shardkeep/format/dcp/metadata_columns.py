"""Rows of metadata, converted to the columns of an index and checked on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.errors import FormatError
from shardkeep.format.excerpt import shown
from shardkeep.format.names import safe_file_name
from shardkeep.types import I64, ITEMSIZES, MAX_DIMS, Chunks, DType, Objects, Tensors

__all__ = ["Files", "Placed", "Row", "chunk_columns", "object_columns", "tensor_columns"]

Ints = tuple[int, ...]
Placed = tuple[str, int, int, tuple[str, ...]]
"""File, offset, length and transforms of an item."""
Row = tuple[int, Ints, Ints, Placed]
"""A chunk: row of its tensor, offsets, sizes, location."""


_TRANSFORMS = 1000
"""Maximum number of different lists of stream transforms in one checkpoint."""


class Files:
    """The files and the transforms that an index refers to, each once."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._raw: dict[str, int] = {}
        self._transforms: dict[tuple[str, ...], int] = {(): 0}

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(self._files)

    @property
    def transforms(self) -> tuple[tuple[str, ...], ...]:
        return tuple(self._transforms)

    def number(self, path: str) -> int:
        """Return the position of a file. Raises FormatError if the path leaves the folder."""
        known = self._raw.get(path)
        if known is None:
            safe = safe_file_name(path)
            known = self._raw[path] = self._files.setdefault(safe, len(self._files))
        return known

    def columns(self, places: Sequence[Placed]) -> tuple[Any, Any, Any, Any]:
        """Return file, start, length and transform of items, as columns."""
        number, transforms = self.number, self._transforms
        kinds = [transforms.setdefault(place[3], len(transforms)) for place in places]
        if len(transforms) > _TRANSFORMS:
            raise FormatError(f"{len(transforms)} different stream transforms")
        return (
            np.array([number(place[0]) for place in places], dtype=np.int32),
            np.array([place[1] for place in places], dtype=np.int64),
            np.array([place[2] for place in places], dtype=np.int64),
            np.array(kinds, dtype=np.int16),
        )


def tensor_columns(names: Sequence[str], dtypes: Sequence[DType], shapes: Sequence[Any]) -> Tensors:
    """Return tensors as columns.

    Raises:
        FormatError: an invalid shape: not integers, negative, too many dimensions, or so large that
            its bytes cannot be counted in 64 bits.
    """

    def bad(row: int, what: str) -> FormatError:
        return FormatError(f"{what} {shown(shapes[row])}", place=f"tensor {shown(names[row])}")

    ndim = _lengths(shapes, lambda row: bad(row, "a shape has too many dimensions:"))
    shape = _table(shapes, ndim, 1, lambda row: bad(row, "invalid shape:"))
    codes = np.array([dtype.code for dtype in dtypes], dtype=np.uint8)
    itemsize = ITEMSIZES[codes]
    # In floats, with sizes of 0 as 1: a product of the other sizes must not overflow either.
    nbytes = np.prod(np.maximum(shape, 1), axis=1, dtype=np.float64) * itemsize
    large = np.flatnonzero(nbytes > 2.0**62)
    for row in large.tolist():
        if prod(max(size, 1) for size in shapes[row]) * dtypes[row].itemsize >= 1 << 63:
            raise bad(row, "a shape has too many bytes:")
    return Tensors(tuple(names), codes, ndim.astype(np.uint8), shape)


def chunk_columns(
    rows: Sequence[Row], tensors: Tensors, files: Files, payload: Sequence[int] | None = None
) -> Chunks:
    """Return chunks as columns.

    Args:
        rows: in the order of the tensors.
        tensors: the tensors that the chunks are boxes of.
        files: collects the files that the rows name.
        payload: where each payload starts, if known.

    Raises:
        FormatError: a box is invalid or leaves its tensor; a file name leaves the folder.
    """

    def bad(row: int, what: str) -> FormatError:
        tensor, offsets, sizes, _ = rows[row]
        box = f"{what}: offsets {shown(offsets)}, sizes {shown(sizes)}"
        return FormatError(box, place=f"tensor {shown(tensors.names[tensor])}")

    tensor = np.array([row[0] for row in rows], dtype=np.int64)
    ndim = tensors.ndim[tensor].astype(np.int64)
    tables = []
    for part, fill in ((1, 0), (2, 1)):
        boxes: list[Any] = [row[part] for row in rows]
        lengths = _lengths(boxes, lambda row: bad(row, "invalid box"))
        wrong = np.flatnonzero(lengths != ndim)
        if wrong.size:
            raise bad(int(wrong[0]), f"a box of other than {ndim[wrong[0]]} dimensions")
        width = tensors.shape.shape[1]
        tables.append(_table(boxes, ndim, fill, lambda row: bad(row, "invalid box"), width))
    offsets, sizes = tables
    outside = np.flatnonzero((sizes > tensors.shape[tensor] - offsets).any(axis=1))
    if outside.size:
        raise bad(int(outside[0]), "a box that leaves its tensor")
    file, item, length, transform = files.columns([row[3] for row in rows])
    return Chunks(
        tensor=tensor,
        offsets=offsets,
        sizes=sizes,
        file=file,
        item=item,
        length=length,
        payload=np.full(len(rows), -1) if payload is None else np.array(payload, dtype=np.int64),
        transform=transform,
        block=np.zeros(len(rows) + 1, dtype=np.int64),
        checksums=np.zeros(0, dtype=np.uint32),
    )


def object_columns(objects: Mapping[str, Placed], files: Files) -> Objects:
    """Return objects as columns. Raises FormatError if a file name leaves the folder."""
    file, item, length, transform = files.columns(list(objects.values()))
    crc = np.full(len(objects), -1, dtype=np.int64)
    return Objects(tuple(objects), file, item, length, transform, crc, {})


def _lengths(rows: Sequence[Any], bad: Any) -> I64:
    """Return the length of each row, which must be a tuple."""
    wrong = [row for row, value in enumerate(rows) if type(value) is not tuple]
    if wrong:
        raise bad(wrong[0])
    lengths: I64 = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    if lengths.size and lengths.max() > MAX_DIMS:
        raise bad(int(lengths.argmax()))
    return lengths


def _table(rows: Sequence[Any], lengths: I64, fill: int, bad: Any, width: int | None = None) -> I64:
    """Return rows of integers >= 0 as one padded table."""
    flat = list(chain.from_iterable(rows))
    if not set(map(type, flat)) <= {int} or (flat and not 0 <= min(flat) <= max(flat) < 1 << 62):
        raise bad(next(row for row, value in enumerate(rows) if not _sizes(value)))
    columns = width if width is not None else int(lengths.max(initial=0))
    table = np.full((len(rows), columns), fill, dtype=np.int64)
    inside: NDArray[np.bool_] = np.arange(columns) < lengths[:, None]
    table[inside] = flat
    return table


def _sizes(row: Any) -> bool:
    return all(type(size) is int and 0 <= size < 1 << 62 for size in row)
