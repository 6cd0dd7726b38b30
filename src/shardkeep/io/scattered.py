"""Many small things that lie scattered in memory: picked up, or put where they belong, at once."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from shardkeep.io.arena import memory_at
from shardkeep.plan.distinct import distinct
from shardkeep.types import I64

__all__ = ["pick_up", "put"]

_WORD = 8
"""Bytes of what is moved at once: things of whole words, that lie at multiples of one."""

_FEW = 32
"""Things of one size up to which a call for each is as quick."""


def pick_up(addresses: I64, sizes: I64) -> list[bytes]:
    """Copies of what lies at these addresses, in so many bytes each.

    The memory must stay as it is meanwhile; of what lies between nothing is looked at.
    """
    found, left = [b""] * len(sizes), np.ones(len(sizes), dtype=np.bool_)
    for size, rows in _alike(sizes, addresses % _WORD == 0):
        words, index = _words(addresses[rows], size)
        data = words[index].tobytes()
        parts = [data[at : at + size] for at in range(0, len(data), size)]
        if len(rows) == len(found):
            return parts
        for row, part in zip(rows.tolist(), parts, strict=True):
            found[row] = part
        left[rows] = False
    for row in np.flatnonzero(left).tolist():
        found[row] = ctypes.string_at(int(addresses[row]), int(sizes[row]))
    return found


def put(source: NDArray[np.uint8], starts: I64, sizes: I64, addresses: I64) -> None:
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
