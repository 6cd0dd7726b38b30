"""Many records of one layout, assembled as columns: a byte template, filled in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.types import I64

__all__ = ["Part", "integers", "records", "references"]

Bytes = NDArray[np.uint8]
"""[N, k]: k bytes of each of N records."""

Part = bytes | Bytes | tuple[bytes | Bytes, NDArray[np.bool_]]
"""A part of a record: bytes that all records share, or a column; and which records have it."""

_Masked = tuple[bytes | Bytes, NDArray[np.bool_] | None]

_STEP = 1 << 16
"""Records that are assembled at a time, so that they fit in the cache and need little memory."""


def records(count: int, parts: Sequence[Part]) -> bytes:
    """Return `count` records one after the other, each of these parts in this order."""
    pairs = [_masked(part) for part in parts]
    return b"".join(
        _records(slice(start, min(start + _STEP, count)), pairs) for start in range(0, count, _STEP)
    )


def _masked(part: Part) -> _Masked:
    if not isinstance(part, tuple):
        return part, None
    return part[0], None if part[1].all() else part[1]


def _records(rows: slice, parts: Sequence[_Masked]) -> bytes:
    widths = [len(part) if isinstance(part, bytes) else part.shape[1] for part, _ in parts]
    table = np.empty((rows.stop - rows.start, sum(widths)), np.uint8)
    masked = any(mask is not None for _, mask in parts)
    kept = np.ones(table.shape, np.bool_) if masked else None
    at = 0
    for (part, mask), width in zip(parts, widths, strict=True):
        place = slice(at, at + width)
        table[:, place] = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else part[rows]
        if mask is not None and kept is not None:
            kept[:, place] = mask[rows, None]
        at += width
    return (table if kept is None else table[kept]).tobytes()


def integers(values: I64) -> Bytes:
    """Return the opcodes that push each int (>= 0) of a column, as wide as the largest needs."""
    largest = int(values.max(initial=0))
    if largest < 1 << 8:
        return _coded(b"K", values, "u1")
    if largest < 1 << 31:
        return _coded(b"J", values, "<i4")
    return _coded(b"\x8a\x08", values, "<i8")


def references(numbers: I64) -> Bytes:
    """Return the opcodes that push the constants with these numbers."""
    return _coded(b"j", numbers, "<u4")


def _coded(opcode: bytes, values: NDArray[Any], dtype: str) -> Bytes:
    wide = np.dtype(dtype).itemsize
    coded = np.empty((len(values), len(opcode) + wide), np.uint8)
    coded[:, : len(opcode)] = np.frombuffer(opcode, np.uint8)
    coded[:, len(opcode) :] = values.astype(dtype)[:, None].view(np.uint8)
    return coded
