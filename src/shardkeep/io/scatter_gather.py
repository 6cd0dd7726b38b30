"""Copies between a table and many scattered places in memory, without a call for each place."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from shardkeep.io.arena import memory_at
from shardkeep.plan.distinct import distinct
from shardkeep.types import I64

__all__ = ["gather_bytes", "scatter_bytes"]

_WORD_BYTES = 8
"""Unit of a fast copy: sizes and addresses must be multiples of it."""

_FEW_ROWS = 32
"""Up to this many places of one size, a call for each is as fast."""


def gather_bytes(addresses: I64, into: NDArray[np.uint8]) -> None:
    """Copy bytes from many addresses into the rows of a table.

    The memory must not change meanwhile. Bytes between the addresses are not read.

    Args:
        addresses: [N] address of the bytes of each row; 0 leaves the row unchanged.
        into: [N, bytes] a table with contiguous rows, which need not be adjacent.
    """
    rows, size = np.flatnonzero(addresses), into.shape[1]
    if not size or not len(rows):
        return
    there = addresses[rows]
    if size % _WORD_BYTES == 0 and not (there % _WORD_BYTES).any():
        words, index = _words(there, size)
        into[rows] = words[index].view(np.uint8)
        return
    places = into.ctypes.data + rows * into.strides[0]
    deque(map(ctypes.memmove, places.tolist(), there.tolist(), repeat(size)), maxlen=0)


def scatter_bytes(source: NDArray[np.uint8], starts: I64, sizes: I64, addresses: I64) -> None:
    """Copy ranges of `source` to many addresses.

    Args:
        source: the bytes to copy.
        starts: [N] first byte of each range.
        sizes: [N] bytes of each range.
        addresses: [N] destination of each range.
    """
    left = np.ones(len(sizes), dtype=np.bool_)
    whole = source[: len(source) // _WORD_BYTES * _WORD_BYTES].view(np.int64)
    for size, rows in _alike(sizes, (addresses % _WORD_BYTES == 0) & (starts % _WORD_BYTES == 0)):
        words, index = _words(addresses[rows], size, write=True)
        words[index] = whole[_places(starts[rows], size)]
        left[rows] = False
    rows = np.flatnonzero(left)
    begin = starts[rows] + source.ctypes.data
    moves = map(ctypes.memmove, addresses[rows].tolist(), begin.tolist(), sizes[rows].tolist())
    deque(moves, maxlen=0)


def _alike(sizes: I64, aligned: NDArray[np.bool_]) -> Iterator[tuple[int, I64]]:
    """Yield each size in whole words that many aligned ranges have, and their rows."""
    rows = np.flatnonzero(aligned & (sizes % _WORD_BYTES == 0) & (sizes > 0))
    number, first = distinct([sizes[rows]])
    for kind in np.flatnonzero(np.bincount(number) > _FEW_ROWS).tolist():
        yield int(sizes[rows[first[kind]]]), rows[number == kind]


def _words(addresses: I64, size: int, *, write: bool = False) -> tuple[NDArray[np.int64], I64]:
    """Return the memory from the lowest address on as words, and [N, words] of each address."""
    base = int(addresses.min())
    memory = memory_at(base, int(addresses.max()) - base + size, write=write)
    return np.frombuffer(memory, dtype=np.int64), _places(addresses - base, size)


def _places(starts: I64, size: int) -> I64:
    places: I64 = starts[:, None] // _WORD_BYTES + np.arange(size // _WORD_BYTES)
    return places
