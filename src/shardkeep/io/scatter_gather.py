"""Many small things that lie scattered in memory: picked up, or put where they belong, at once."""

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

_WORD = 8
"""Bytes of what is moved at once: things of whole words, that lie at multiples of one."""

_FEW = 32
"""Things of one size up to which a call for each is as quick."""


def gather_bytes(addresses: I64, into: NDArray[np.uint8]) -> None:
    """Copy things alike, by the address of each, into the rows of a table.

    The memory must stay as it is meanwhile; of what lies between nothing is looked at.

    Args:
        addresses: [N] where each lies; 0 leaves the row as it is.
        into: [N, bytes] whose rows are contiguous, but need not follow each other.
    """
    rows, size = np.flatnonzero(addresses), into.shape[1]
    if not size or not len(rows):
        return
    there = addresses[rows]
    if size % _WORD == 0 and not (there % _WORD).any():
        words, index = _words(there, size)
        into[rows] = words[index].view(np.uint8)
        return
    places = into.ctypes.data + rows * into.strides[0]
    deque(map(ctypes.memmove, places.tolist(), there.tolist(), repeat(size)), maxlen=0)


def scatter_bytes(source: NDArray[np.uint8], starts: I64, sizes: I64, addresses: I64) -> None:
    """Copy things to these addresses: so many bytes each, from where they start in `source`."""
    left = np.ones(len(sizes), dtype=np.bool_)
    whole = source[: len(source) // _WORD * _WORD].view(np.int64)
    for size, rows in _alike(sizes, (addresses % _WORD == 0) & (starts % _WORD == 0)):
        words, index = _words(addresses[rows], size, write=True)
        words[index] = whole[_places(starts[rows], size)]
        left[rows] = False
    rows = np.flatnonzero(left)
    begin = starts[rows] + source.ctypes.data
    moves = map(ctypes.memmove, addresses[rows].tolist(), begin.tolist(), sizes[rows].tolist())
    deque(moves, maxlen=0)


def _alike(sizes: I64, aligned: NDArray[np.bool_]) -> Iterator[tuple[int, I64]]:
    """Sizes of whole words that many of the aligned things have, and which those are."""
    rows = np.flatnonzero(aligned & (sizes % _WORD == 0) & (sizes > 0))
    number, first = distinct([sizes[rows]])
    for kind in np.flatnonzero(np.bincount(number) > _FEW).tolist():
        yield int(sizes[rows[first[kind]]]), rows[number == kind]


def _words(addresses: I64, size: int, *, write: bool = False) -> tuple[NDArray[np.int64], I64]:
    """Memory from the lowest address on, and which of its words each thing has: [N, words]."""
    base = int(addresses.min())
    memory = memory_at(base, int(addresses.max()) - base + size, write=write)
    return np.frombuffer(memory, dtype=np.int64), _places(addresses - base, size)


def _places(starts: I64, size: int) -> I64:
    places: I64 = starts[:, None] // _WORD + np.arange(size // _WORD)
    return places
