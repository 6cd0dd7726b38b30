"""Reading of boxes of stored chunks into memory, with few reads and verified checksums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from shardkeep import settings
from shardkeep.errors import Damaged, FormatError
from shardkeep.io.arena import allocate_pages
from shardkeep.io.checksums import crc32, crc32_at
from shardkeep.io.pool import ProgressMeter, parallel
from shardkeep.io.read.ranges import (
    MISSING,
    MergedRead,
    WantedRange,
    describe_mismatch,
    describe_short_file,
    fetch_steps,
)
from shardkeep.io.read.requests import (
    ChunkCopy,
    InPlaceRead,
    RequestPlanner,
    RowRead,
    RunTarget,
    run_targets,
)
from shardkeep.io.read.running_checksums import RunningChecksums
from shardkeep.plan.memory_budget import MemoryBudget
from shardkeep.plan.reads import block_range, byte_runs
from shardkeep.settings import BLOCK, PAGE
from shardkeep.stores.abilities import SupportsReadRows
from shardkeep.stores.contract import Store
from shardkeep.types import Progress

__all__ = ["ChunkCopy", "ReadRound", "ReadStats", "read_copies"]

_STEP_BYTES = 8 * BLOCK
"""Bytes that are checksummed at a time, while they are in the cache. With fewer, threads spend more
time waiting for the interpreter than they save."""

_Job = InPlaceRead | RowRead | MergedRead | ChunkCopy | Callable[[], None]
"""A copy is a job of its own if the bytes of its source are in memory already."""


@dataclass(frozen=True, slots=True)
class ReadStats:
    """What a read did.

    Attributes:
        bytes_read: bytes read from the store.
        bytes_needed: bytes of the boxes.
        unchecked: tensors with bytes that were not compared with a checksum, because there is none,
            because the payload was not read in full, or because `verify` was False.
        bytes_unchecked: how many of the needed bytes were not compared.
    """

    bytes_read: int
    bytes_needed: int
    unchecked: tuple[str, ...] = ()
    bytes_unchecked: int = 0


class ReadRound(NamedTuple):
    """Copies that are read after the previous round is complete.

    Attributes:
        copies: what is read in this round.
        done: called when the round is complete, while the next one is read. The one after that may
            use the same memory.
    """

    copies: Sequence[ChunkCopy]
    done: Callable[[], None]


def read_copies(
    store: Store,
    copies: Sequence[ChunkCopy],
    rounds: Sequence[ReadRound] = (),
    *,
    verify: bool = True,
    threads: int,
    budget: int | None = None,
    progress: Progress | None = None,
) -> ReadStats:
    """Fill the destinations of `copies` and then those of each round, with several threads.

    Payloads with block checksums are read and checked by whole blocks.

    After an error, the content of the destinations is undefined, and all threads have stopped.

    Args:
        store: the store of the files.
        copies: what is read first.
        rounds: what is read after that, one round after the other.
        verify: compare what is read with checksums.
        threads: number of threads that read.
        budget: bytes that the buffers and the store's direct reads share (`plan.memory_budget`); by
            default the setting.
        progress: receives the number of bytes read.

    Raises:
        Damaged: a block or a payload does not match its CRC-32, or a file is missing or too short.
            The error names the file and the tensor.
        FormatError: a source contradicts itself; nothing was read.
        ValueError: a destination does not fit its box; nothing was read.
    """
    limit = MemoryBudget.of(budget).read_buffer_bytes(threads)
    in_rows = isinstance(store, SupportsReadRows)
    every = [*copies, *(copy for later in rounds for copy in later.copies)]
    needed = sum(map(_check, every))

    def planned(some: Sequence[ChunkCopy]) -> tuple[list[_Job], list[RunTarget]]:
        planner = RequestPlanner(settings.read_gap_bytes(), limit, verify, in_rows)
        return _jobs(some, planner), planner.uses

    work = [planned(copies), *(planned(later.copies) for later in rounds)]
    meter = ProgressMeter(progress, "read", sum(_nbytes(job) for jobs, _ in work for job in jobs))
    sums = RunningChecksums(every, verify)
    read: list[int] = []

    def worker(uses: list[RunTarget], mine: Iterator[_Job]) -> None:
        hand = _Worker(store, verify, limit, sums)
        for job in mine:
            read.append(hand.do(job, uses))
            meter.add(_nbytes(job))

    before: list[_Job] = []
    for number, (jobs, uses) in enumerate(work):
        parallel([*before, *jobs], partial(worker, uses), threads)
        before = [rounds[number - 1].done] if number else []
    parallel(before, partial(worker, []), 1)
    left = [copy for copy in sums.compare() if copy.into.nbytes]
    names = tuple(dict.fromkeys(copy.name for copy in left))
    return ReadStats(sum(read), needed, names, sum(copy.into.nbytes for copy in left))


def _jobs(copies: Sequence[ChunkCopy], planner: RequestPlanner) -> list[_Job]:
    """Return the jobs for some copies."""
    jobs: list[_Job] = []
    for copy in copies:
        if copy.source.data is not None:
            jobs.append(copy)
        elif copy.into.nbytes:
            try:
                planner.add(copy)
            except FormatError as error:
                raise error.within(place=f"tensor {copy.name!r}") from None
    return [*jobs, *planner.jobs()]


class _Worker:
    """Does the jobs of one thread, with a buffer of its own."""

    def __init__(self, store: Store, verify: bool, limit: int, sums: RunningChecksums) -> None:
        self._store, self._verify, self._limit, self._sums = store, verify, limit, sums
        self._space: NDArray[np.uint8] | None = None

    def do(self, job: _Job, uses: Sequence[RunTarget]) -> int:
        """Do one job, and return the number of bytes read from the store."""
        if isinstance(job, ChunkCopy):
            _take_from_memory(job, self._verify)
            return 0
        if callable(job):
            job()
            return 0
        if isinstance(job, InPlaceRead):
            _read_in_place(self._store, job, self._sums)
        elif isinstance(job, MergedRead):
            space = self._buffer(job.low, job.high)
            _read(self._store, job, uses, space, self._verify, self._sums)
        elif not _read_rows(self._store, job):
            planner = RequestPlanner(settings.read_gap_bytes(), self._limit, self._verify)
            planner.add(job.copy)
            return sum(self.do(part, planner.uses) for part in planner.jobs())
        return job.into.nbytes if isinstance(job, RowRead) else job.high - job.low

    def _buffer(self, low: int, high: int) -> NDArray[np.uint8]:
        """Return memory for these bytes of a file, as far past a page as in the file.

        On some processors (Zen 3), copies are several times slower if the destination starts a few
        bytes later in its page than the source in its own.
        """
        if self._space is None:
            self._space = allocate_pages(self._limit + PAGE)
        first = low % PAGE
        return self._space[first : first + high - low]


def _nbytes(job: _Job) -> int:
    if callable(job):
        return 0
    return job.into.nbytes if isinstance(job, ChunkCopy | RowRead) else job.high - job.low


def _check(copy: ChunkCopy) -> int:
    """Return the number of bytes of a copy, after checking that its parts fit each other."""
    into, box, source = copy.into, copy.box, copy.source
    if into.shape != box.sizes or into.itemsize != source.itemsize:
        raise ValueError(
            f"{copy.name!r}: a box of sizes {list(box.sizes)} and items of {source.itemsize} bytes "
            f"cannot be copied to an array of shape {list(into.shape)} and items of {into.itemsize}"
        )
    if not into.flags.writeable:
        raise ValueError(f"{copy.name!r}: its destination is read-only")
    nbytes = source.payload[1]
    if source.checksums is not None and len(source.checksums) != -(-nbytes // BLOCK):
        raise FormatError(
            f"{len(source.checksums)} block checksums for a payload of {nbytes} bytes",
            file=source.file,
            place=f"tensor {copy.name!r}",
        )
    return into.nbytes


def _read_in_place(store: Store, job: InPlaceRead, sums: RunningChecksums) -> None:
    """Read in place, and compute one CRC-32 of all bytes of the job on the way.

    Only if it differs from the combined checksums of the blocks, each block is checked.
    """
    copy, view, crc, end = job.copy, job.into.data, 0, 0
    summed = sums.wants(copy.source)
    checksumming = job.crc is not None or summed
    address = job.into.ctypes.data
    step = _STEP_BYTES if checksumming else len(view)
    for done in fetch_steps(store, job.file, job.low, view, copy.name, step=step, keep=copy.shared):
        if checksumming:
            crc = crc32_at(address + end, view[end:done], crc)
        end = done
    if end < len(view):
        what = describe_short_file(job.low + end, job.high)
        raise Damaged(what, file=job.file, name=copy.name)
    if summed:
        sums.add(copy.source, job.low, job.high, crc)
    if job.crc is not None and job.crc != crc:
        _check_blocks(copy, job.into, job.low, job.low, job.high)
        raise Damaged(describe_mismatch(crc, job.crc), file=job.file, name=copy.name)


def _read_rows(store: Store, job: RowRead) -> bool:
    """Read by rows, and return whether the store could."""
    try:
        return cast(SupportsReadRows, store).read_rows(job.file, job.starts, job.into)
    except FileNotFoundError:
        raise Damaged(MISSING, file=job.file, name=job.copy.name) from None


def _read(
    store: Store,
    job: MergedRead,
    uses: Sequence[RunTarget],
    space: NDArray[np.uint8],
    verify: bool,
    sums: RunningChecksums,
) -> None:
    """Read once, check each block as soon as it is read, and copy bytes to their destinations."""
    waiting = iter(job.wants)
    want: WantedRange | None = next(waiting)
    checked: dict[tuple[int, int], int] = {}
    end, first = job.low, uses[job.wants[0].use].copy
    step = _STEP_BYTES if verify and first.source.checksums is not None else len(space)
    keep = _shared(job, uses)
    for done in fetch_steps(store, job.file, job.low, space.data, first.name, step=step, keep=keep):
        end = job.low + done
        while want is not None and want.low < end:
            use = uses[want.use]
            if verify and use.copy.source.checksums is not None:
                # Ranges are sorted, so the blocks of a payload are checked up to some byte.
                payload = use.copy.source.payload
                low = checked.get(payload, want.low)
                high = want.high if want.high <= end else end - (end - payload[0]) % BLOCK
                if low < high:
                    _check_blocks(use.copy, space, job.low, max(low, want.low), high)
                    checked[payload] = high
            if want.high > end:
                break
            if sums.wants(use.copy.source):
                crc = crc32(space[want.low - job.low : want.high - job.low])
                sums.add(use.copy.source, want.low, want.high, crc)
            _place(use, space, job.low)
            want = next(waiting, None)
    if want is not None:
        raise Damaged(
            describe_short_file(end, want.high), file=job.file, name=uses[want.use].copy.name
        )


def _shared(job: MergedRead, uses: Sequence[RunTarget]) -> bool:
    """Return whether other processes need these bytes, too.

    If a read is mostly gaps, they are assumed to need the gaps.
    """
    needed = sum(uses[want.use].into.nbytes for want in job.wants)
    return 2 * needed < job.high - job.low or any(uses[want.use].copy.shared for want in job.wants)


def _take_from_memory(copy: ChunkCopy, verify: bool) -> None:
    """Copy from a source whose bytes are in memory already."""
    source = copy.source
    if not copy.box.numel:
        return
    space = np.frombuffer(source.data or b"", dtype=np.uint8)
    end = sum(source.payload)
    if end > len(space):
        raise Damaged(describe_short_file(len(space), end), file=source.file, name=copy.name)
    try:
        found = byte_runs(source, copy.box, BLOCK)
    except FormatError as error:
        raise error.within(place=f"tensor {copy.name!r}") from None
    for use in run_targets(copy, found, copy.into):
        if verify:
            low, high = block_range(use.start, use.start + found.span, source.payload, BLOCK)
            _check_blocks(copy, space, 0, low, high)
        _place(use, space, 0)


def _check_blocks(
    copy: ChunkCopy, space: NDArray[np.uint8], base: int, low: int, high: int
) -> None:
    """Check the blocks from byte `low` to `high` of the file; `space` starts at byte `base`."""
    source, view = copy.source, space.data
    if source.checksums is None:
        return
    first, nbytes = source.payload
    address = space.ctypes.data - base
    for start in range(low, high, BLOCK):
        block = (start - first) // BLOCK
        part = view[start - base : min(start + BLOCK, first + nbytes) - base]
        crc = crc32_at(address + start, part)
        if crc != source.checksums[block]:
            what = describe_mismatch(crc, int(source.checksums[block]))
            raise Damaged(what, file=source.file, name=copy.name, block=block)


def _place(use: RunTarget, space: NDArray[np.uint8], base: int) -> None:
    """Copy one run to its destination; `space` starts at byte `base` of the file."""
    at = use.start - base
    if use.shape is None:
        use.into[:] = space[at : at + len(use.into)]
    else:
        use.into[...] = np.ndarray(use.shape, use.into.dtype, space, at, use.strides)
