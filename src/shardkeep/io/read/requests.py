"""Requests to files for many copies: which bytes, in which reads, and their destinations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from shardkeep.io.checksums import whole_crc
from shardkeep.io.read.ranges import MergedRead, WantedRange, merge_ranges
from shardkeep.plan.reads import ByteRuns, ChunkSource, block_range, byte_runs, split
from shardkeep.settings import BLOCK
from shardkeep.types import I64, Box

__all__ = ["ChunkCopy", "InPlaceRead", "RequestPlanner", "RowRead", "RunTarget", "run_targets"]

_PIECE = 16 << 20
"""Size limit of a request that reads in place. Smaller ones would cost more time in Python, during
which the other threads wait."""

_MIN_IN_PLACE_BYTES = 2 * BLOCK
"""Runs of this size or more are read in place. Smaller ones share reads with others."""

_ROW_COST_BYTES = 16 * 1024
"""Reading one more row costs as much as reading this many bytes, so rows that are nearer are read
together with the gap between them. (Measured: 2.5 us a row, 0.2 ns a byte.)"""

_ROWS, _ROWS_BYTES = 512, 4 << 20
"""Limits of a request by rows: rows, and bytes. Smaller ones would cost more time in Python."""


@dataclass(frozen=True, slots=True, eq=False)
class ChunkCopy:
    """A box of one stored chunk, and the memory that it is copied to.

    Attributes:
        name: the tensor, for errors.
        source: where the chunk is stored.
        box: the part to copy, relative to the chunk.
        into: a writable array of the box's sizes, with any strides and any dtype of the stored item
            size. Its bytes are replaced without conversion.
        shared: other processes on this host read the same bytes at about the same time. They should
            be read from the disk once (in a `LocalStore`, through the page cache).
    """

    name: str
    source: ChunkSource
    box: Box
    into: NDArray[Any]
    shared: bool = False


class RunTarget(NamedTuple):
    """The destination of one run of bytes, which starts at byte `start` of the file.

    If `shape` is None, the run is copied to `into` as plain bytes. Otherwise the run is an array of
    that shape and these strides.
    """

    copy: ChunkCopy
    start: int
    into: NDArray[Any]
    shape: tuple[int, ...] | None
    strides: tuple[int, ...]


class InPlaceRead(NamedTuple):
    """Bytes that are read directly to their destination; whole blocks, if they are checked.

    Attributes:
        file, low, high: the bytes to read.
        copy: the copy that needs them.
        into: their destination.
        crc: the CRC-32 of all of them, computed from the checksums of their blocks; None if they
            are not checked.
    """

    file: str
    low: int
    high: int
    copy: ChunkCopy
    into: NDArray[np.uint8]
    crc: int | None = None


class RowRead(NamedTuple):
    """Many short runs that are read directly to their destinations, without the gaps between them.

    Attributes:
        file, low, high: the bytes that span all runs.
        copy: the same part as a box, for stores that cannot read rows.
        starts: [R] first byte of each run.
        into: [R, L] their destinations.
    """

    file: str
    low: int
    high: int
    copy: ChunkCopy
    starts: I64
    into: NDArray[np.uint8]


class RequestPlanner:
    """Plans the requests for copies out of files.

    Args:
        gap: largest gap between needed bytes that is read rather than skipped.
        limit: size limit of a read into a buffer, at least four blocks.
        verify: payloads with checksums are read by whole blocks.
        rows: the store can read in rows (`stores.abilities.SupportsReadRows`).
    """

    def __init__(self, gap: int, limit: int, verify: bool, rows: bool = False) -> None:
        self._gap, self._limit, self._verify, self._rows = gap, limit, verify, rows
        self._wants: list[WantedRange] = []
        self._straight: list[InPlaceRead] = []
        self._in_rows: list[RowRead] = []
        self.uses: list[RunTarget] = []

    def jobs(self) -> list[InPlaceRead | RowRead | MergedRead]:
        """Return all requests, sorted by file and position. Their rows are those of `uses`."""
        reads = merge_ranges(self._wants, self._gap, self._limit)
        return sorted([*self._straight, *self._in_rows, *reads], key=lambda job: job[:2])

    def add(self, copy: ChunkCopy) -> None:
        """Add a copy to the plan. Raises FormatError if its source contradicts itself."""
        source, box, into = copy.source, copy.box, copy.into
        checked = self._verify and source.checksums is not None
        if self._rows and not checked and self._add_rows(copy):
            return
        # Runs that are nearer than a block share blocks, so they are read as one.
        gap = max(self._gap, BLOCK) if checked else self._gap
        found = byte_runs(source, box, gap)
        if found.gapless and _first_part(found, into).flags.c_contiguous:
            for use in _plain_targets(copy, found):
                if found.span >= _MIN_IN_PLACE_BYTES:
                    self._add_in_place(use, checked)
                else:
                    self._want(use, found.span, checked)
            return
        for part, its_runs in split(source, box, gap, self._limit, BLOCK if checked else 1):
            there = into[part.relative_to(box).slices]
            for use in run_targets(copy, its_runs, there):
                self._want(use, its_runs.span, checked)

    def _add_rows(self, copy: ChunkCopy) -> bool:
        """Plan a copy by rows if its runs are long and far enough apart; return whether it was."""
        source, box = copy.source, copy.box
        found = byte_runs(source, box, min(self._gap, _ROW_COST_BYTES))
        if not found.outer or not found.gapless:
            return False
        first = _first_part(found, copy.into)
        if found.span >= _MIN_IN_PLACE_BYTES or not first.flags.c_contiguous:
            return False
        counts = [box.sizes[d] for d in found.outer]
        strides = [copy.into.strides[d] for d in found.outer]
        row = first.reshape(-1).view(np.uint8)
        targets = as_strided(row, (*counts, found.span), (*strides, 1))
        starts = found.starts.reshape(counts)
        step = max(1, min(_ROWS, _ROWS_BYTES // found.span))
        last = found.outer[-1]
        for index in np.ndindex(*counts[:-1]):
            for at in range(0, counts[-1], step):
                offsets, sizes = list(box.offsets), list(box.sizes)
                for d, i in zip(found.outer, index, strict=False):
                    offsets[d], sizes[d] = box.offsets[d] + i, 1
                offsets[last], sizes[last] = box.offsets[last] + at, min(step, counts[-1] - at)
                part = Box(tuple(offsets), tuple(sizes))
                its_starts, into = starts[index][at : at + step], targets[index][at : at + step]
                low, high = int(its_starts[0]), int(its_starts[-1]) + found.span
                there = copy.into[part.relative_to(box).slices]
                same = replace(copy, box=part, into=there)
                self._in_rows.append(RowRead(source.file, low, high, same, its_starts, into))
        return True

    def _want(self, use: RunTarget, length: int, checked: bool) -> None:
        source = use.copy.source
        low, high = use.start, use.start + length
        if checked:
            low, high = block_range(low, high, source.payload, BLOCK)
        self._wants.append(WantedRange(source.file, low, high, len(self.uses)))
        self.uses.append(use)

    def _add_in_place(self, use: RunTarget, checked: bool) -> None:
        """Plan to read whole blocks in place, and the rest at both ends through a buffer."""
        source, start, stop = use.copy.source, use.start, use.start + len(use.into)
        low, high = start, stop
        if checked:
            first, nbytes = source.payload
            low += (first - start) % BLOCK
            if stop < first + nbytes:
                high -= (stop - first) % BLOCK
        for begin, end in ((start, low), (high, stop)):
            if begin < end:
                edge = use._replace(start=begin, into=use.into[begin - start : end - start])
                self._want(edge, end - begin, checked)
        for begin in range(low, high, _PIECE):
            end = min(begin + _PIECE, high)
            into = use.into[begin - start : end - start]
            crc = _crc(source, begin, end) if checked else None
            self._straight.append(InPlaceRead(source.file, begin, end, use.copy, into, crc))


def _crc(source: ChunkSource, low: int, high: int) -> int:
    """Return the CRC-32 of the whole blocks from byte `low` to `high` of the file."""
    assert source.checksums is not None
    first = (low - source.payload[0]) // BLOCK
    return whole_crc(source.checksums[first : first - (low - high) // BLOCK], high - low)


def run_targets(copy: ChunkCopy, found: ByteRuns, into: NDArray[Any]) -> Iterator[RunTarget]:
    """Yield each run with its part of `into`."""
    itemsize = copy.source.itemsize
    # As plain words, since a copy must not interpret its values.
    words = into.view(f"u{itemsize}" if itemsize in (1, 2, 4, 8) else f"V{itemsize}")
    for start, part in _parts(found, words):
        yield RunTarget(copy, start, part, found.sizes, found.strides)


def _plain_targets(copy: ChunkCopy, found: ByteRuns) -> Iterator[RunTarget]:
    """Yield each run with its part of `into`, where both are bytes without gaps."""
    for start, part in _parts(found, copy.into):
        yield RunTarget(copy, start, part.reshape(-1).view(np.uint8), None, ())


def _parts(found: ByteRuns, into: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield the start of each run, and the part of `into` at its outer indices."""
    if not found.outer:
        yield int(found.starts[0]), into
        return
    place: list[Any] = [*[slice(None)] * into.ndim, Ellipsis]
    indices = np.ndindex(*[into.shape[d] for d in found.outer])
    for start, index in zip(found.starts.tolist(), indices, strict=True):
        for d, i in zip(found.outer, index, strict=True):
            place[d] = i
        yield start, into[tuple(place)]


def _first_part(found: ByteRuns, into: NDArray[Any]) -> NDArray[Any]:
    """Return the destination of the first run. If it is contiguous, all are."""
    return next(_parts(found, into))[1] if found.outer else into
