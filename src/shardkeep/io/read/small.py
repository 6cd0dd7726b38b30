"""Reading of small payloads, as columns: an object for each of them would cost too much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardkeep.errors import Damaged
from shardkeep.io.checksums import crc32_each
from shardkeep.io.pool import ProgressMeter, parallel
from shardkeep.io.read.ranges import describe_mismatch, describe_short_file, fetch
from shardkeep.io.scatter_gather import scatter_bytes
from shardkeep.settings import BLOCK
from shardkeep.stores.contract import Store
from shardkeep.types import I64, Progress

__all__ = ["SmallPayloads", "SmallRead", "merge_small_reads", "read_small", "sorted_by_place"]

_READ_SPAN_BYTES = 1 << 20
"""The payloads of one read start within this many bytes, so they are cached until moved."""

_MULTITHREADED_BYTES = 16 * 1024
"""Mean size of a payload above which several threads are faster. Below, they wait for the
interpreter."""


@dataclass(frozen=True, slots=True, eq=False)
class SmallPayloads:
    """S whole payloads and their destinations, as columns."""

    names: Sequence[str]
    """Tensors, for errors."""
    files: Sequence[str]
    tensor: I64
    """[S] position in `names`."""
    file: I64
    """[S] position in `files`."""
    start: I64
    """[S] first byte in the file."""
    nbytes: I64
    """[S] from 1 to `BLOCK`."""
    crc: I64
    """[S] CRC-32 of the payload; -1 if it is not known."""
    into: I64
    """[S] address of `nbytes` writable bytes, which the caller keeps alive."""


class SmallRead(NamedTuple):
    """One read of bytes `low` to `high`, for rows `first` to `last` of the sorted payloads."""

    file: str
    low: int
    high: int
    first: int
    last: int


def sorted_by_place(small: SmallPayloads) -> SmallPayloads:
    """Return the payloads sorted by file name and position. Equal positions keep their order."""
    rank = np.empty(len(small.files), dtype=np.int64)
    rank[sorted(range(len(small.files)), key=small.files.__getitem__)] = range(len(small.files))
    order = np.lexsort((small.nbytes, small.start, rank[small.file]))
    columns = {
        name: getattr(small, name)[order]
        for name in ("tensor", "file", "start", "nbytes", "crc", "into")
    }
    return replace(small, **columns)


def merge_small_reads(small: SmallPayloads, gap: int) -> list[SmallRead]:
    """Return the reads for payloads that are sorted by position; neighbours share a read.

    Args:
        small: the payloads, from `sorted_by_place`.
        gap: largest gap between two payloads that is read rather than skipped.
    """
    file, low, high = small.file, small.start, small.start + small.nbytes
    apart = np.flatnonzero((file[1:] != file[:-1]) | (low[1:] - high[:-1] > gap)) + 1
    found = []
    for start, stop in zip([0, *apart.tolist()], [*apart.tolist(), len(low)], strict=True):
        first = start
        while first < stop:
            begin = int(low[first])
            last = first + int(np.searchsorted(low[first:stop], begin + _READ_SPAN_BYTES))
            end = int(high[first:last].max())
            found.append(SmallRead(small.files[file[first]], begin, end, first, last))
            first = last
    return found


def read_small(
    store: Store,
    small: SmallPayloads,
    reads: Sequence[SmallRead],
    *,
    verify: bool = True,
    threads: int,
    progress: Progress | None = None,
) -> int:
    """Fill all destinations and return the number of bytes read.

    Args:
        store: the store of the files.
        small: the payloads, from `sorted_by_place`.
        reads: their reads, from `merge_small_reads`.
        verify: compare each payload with its CRC-32, if it is known.
        threads: number of threads that read.
        progress: receives the number of bytes read.

    Raises:
        Damaged: a payload does not match its CRC-32, or a file is missing or too short. The content
            of the destinations is undefined then, and all threads have stopped.
    """
    total = sum(batch.high - batch.low for batch in reads)
    meter = ProgressMeter(progress, "read", total)

    def worker(mine: Iterator[SmallRead]) -> None:
        space = np.empty(_READ_SPAN_BYTES + BLOCK, dtype=np.uint8)
        for batch in mine:
            _read(store, small, batch, space, verify)
            meter.add(batch.high - batch.low)

    parallel(
        reads,
        worker,
        threads if small.nbytes.sum() >= _MULTITHREADED_BYTES * len(small.nbytes) else 1,
    )
    return total


def _read(
    store: Store, small: SmallPayloads, batch: SmallRead, space: NDArray[np.uint8], verify: bool
) -> None:
    """Read once, check every payload, and copy each to its destination."""
    rows = slice(batch.first, batch.last)
    view = space.data[: batch.high - batch.low]
    name = small.names[int(small.tensor[batch.first])]
    there = fetch(store, batch.file, batch.low, view, name)
    starts = small.start[rows] - batch.low
    ends = starts + small.nbytes[rows]
    if there < len(view) or verify:
        _check(small, batch, view[:there], starts, ends, verify)
    scatter_bytes(space, starts, small.nbytes[rows], small.into[rows])


def _check(
    small: SmallPayloads, batch: SmallRead, view: memoryview, starts: I64, ends: I64, verify: bool
) -> None:
    """Raise Damaged for the first payload that is cut off, or does not match its CRC-32."""
    wanted = small.crc[batch.first : batch.last]
    cut, wrong = ends > len(view), np.zeros(len(ends), dtype=np.bool_)
    if verify:
        places = zip(starts.tolist(), ends.tolist(), strict=True)
        found = np.array(crc32_each([view[start:end] for start, end in places]), dtype=np.int64)
        wrong = (wanted >= 0) & (found != wanted)
    bad = np.flatnonzero(cut | wrong)
    if not len(bad):
        return
    row = int(bad[0])
    name = small.names[int(small.tensor[batch.first + row])]
    if cut[row]:
        what = describe_short_file(batch.low + len(view), batch.low + int(ends[row]))
        raise Damaged(what, file=batch.file, name=name)
    what = describe_mismatch(int(found[row]), int(wanted[row]))
    raise Damaged(what, file=batch.file, name=name, block=0)
