"""Comparison of stored payloads with their checksums; collects all damage."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from shardkeep import settings
from shardkeep.errors import Damaged
from shardkeep.io.arena import allocate_pages
from shardkeep.io.checksums import combine, crc32_at, crc32_blocks
from shardkeep.io.pool import ProgressMeter, parallel
from shardkeep.io.read.ranges import (
    MISSING,
    MergedRead,
    WantedRange,
    describe_mismatch,
    describe_short_file,
    fetch_steps,
    merge_ranges,
)
from shardkeep.settings import BLOCK, PAGE
from shardkeep.stores.contract import Store
from shardkeep.types import Progress

__all__ = ["StoredPayload", "verify_payloads"]

_MAX_READ_BYTES = 4 << 20
"""Size limit of a read, and of the memory that each thread takes."""

_STEP = 8 * BLOCK
"""Bytes that are checksummed at a time, while they are in the cache."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredPayload:
    """Stored bytes, with a checksum for each block, or one for all.

    Attributes:
        name: the tensor or object, for errors.
        file, offset, nbytes: where they are stored, in bytes.
        checksums: CRC-32 of each `BLOCK` bytes. They take precedence over `crc`, since they locate
            the damage.
        crc: CRC-32 of all bytes.
    """

    name: str
    file: str
    offset: int
    nbytes: int
    checksums: NDArray[np.uint32] | None = None
    crc: int | None = None


@dataclass(slots=True)
class _Found:
    """Results for one payload. Each thread adds those of its own pieces."""

    crcs: dict[int, int]
    bad: dict[int, int]
    end: int | None = None
    problem: str | None = None


def verify_payloads(
    store: Store,
    payloads: Sequence[StoredPayload],
    *,
    threads: int,
    progress: Progress | None = None,
) -> list[Damaged]:
    """Check all payloads, with reads of up to 4 MiB in each thread.

    Payloads without a checksum are only checked for presence.

    Args:
        store: the store of the files.
        payloads: what to check.
        threads: number of threads that read.
        progress: receives the number of bytes read.

    Returns:
        All damage, in the order of the payloads: blocks and payloads that do not match, payloads
        for which the file is too short, and payloads that cannot be read (EIO).

    Raises:
        OSError: from the store, for reasons that say nothing about the files.
    """
    found = [_Found({}, {}) for _ in payloads]
    size = lru_cache(maxsize=None)(partial(_size, store))
    wants: list[WantedRange] = []
    for row, payload in enumerate(payloads):
        # A hostile length may be any number, so only bytes inside the file are planned.
        end = payload.offset + payload.nbytes
        there = min(end, size(payload.file))
        if there < 0:
            found[row].problem = MISSING
        elif there < end:
            found[row].end = there
        for at in range(payload.offset, there, _MAX_READ_BYTES):
            wants.append(WantedRange(payload.file, at, min(at + _MAX_READ_BYTES, end), row))
    jobs = list(merge_ranges(wants, settings.read_gap_bytes(), _MAX_READ_BYTES))
    meter = ProgressMeter(progress, "verify", sum(job.high - job.low for job in jobs))
    parallel(jobs, partial(_work, store, payloads, found, meter), threads)
    return [damage for pair in zip(payloads, found, strict=True) for damage in _damage(*pair)]


def _size(store: Store, file: str) -> int:
    """Return the size of a file; -1 if it is missing."""
    try:
        return store.head(file).size
    except FileNotFoundError:
        return -1


def _work(
    store: Store,
    payloads: Sequence[StoredPayload],
    found: Sequence[_Found],
    meter: ProgressMeter,
    jobs: Iterator[MergedRead],
) -> None:
    space = allocate_pages(_MAX_READ_BYTES + PAGE)
    for job in jobs:
        _read(store, payloads, found, job, space)
        meter.add(job.high - job.low)


def _read(
    store: Store,
    payloads: Sequence[StoredPayload],
    found: Sequence[_Found],
    job: MergedRead,
    space: NDArray[np.uint8],
) -> None:
    """Read once, and checksum each step as soon as it is read."""
    # As far past a page as in the file, so that direct reads need no copy.
    there = space[job.low % PAGE :][: job.high - job.low]
    take = partial(_take, payloads, found, job.low, there.data, there.ctypes.data)
    wants, at, low, end, problem = job.wants, 0, job.low, job.low, None
    try:
        for done in fetch_steps(store, job.file, job.low, there.data, None, step=_STEP):
            end = job.low + done
            while at < len(wants):
                low = take(wants[at], max(low, wants[at].low), end)
                if wants[at].high > end:
                    break
                at, low = at + 1, 0
    except Damaged as error:
        problem = error.what
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        problem = str(error)
    for want in wants[at + 1 :]:  # ranges inside another one that is cut off
        take(want, want.low, end)
    left = [want for want in wants[at:] if want.high > end]
    if problem is not None and len(wants) > 1:
        # Only some of the ranges contain the bad sector, so each is read by itself.
        for want in left:
            found[want.use].crcs.pop(want.low, None)
            _read(store, payloads, found, MergedRead(job.file, want.low, want.high, [want]), space)
        return
    for want in left:
        result = found[want.use]
        result.problem = problem or result.problem
        if problem is None:
            result.end = end if result.end is None else min(end, result.end)


def _take(
    payloads: Sequence[StoredPayload],
    found: Sequence[_Found],
    base: int,
    view: memoryview,
    address: int,
    want: WantedRange,
    low: int,
    end: int,
) -> int:
    """Checksum a range from byte `low` of the file up to `end`, as far as it was read.

    A block at the end that is not read completely is left for the next call.

    Args:
        payloads, found: all payloads, and their results.
        base, view, address: the bytes from byte `base` of the file on, and their address.
        want: the range.
        low, end: first byte that is not checksummed yet, and the end of the bytes read.

    Returns:
        The first byte that is still to be checksummed.
    """
    payload, result, high = payloads[want.use], found[want.use], min(want.high, end)
    checksums, first = payload.checksums, (low - payload.offset) // BLOCK
    if checksums is not None and high < want.high:
        high -= (high - payload.offset) % BLOCK
    if low >= high or (checksums is None and payload.crc is None):
        return low
    if checksums is None:
        before = result.crcs.get(want.low, 0)
        part = view[low - base : high - base]
        result.crcs[want.low] = crc32_at(address + low - base, part, before)
        return high
    if high - low <= BLOCK:
        crc = crc32_at(address + low - base, view[low - base : high - base])
        if first < len(checksums) and crc != checksums[first]:
            result.bad[first] = crc
        return high
    for block, crc in enumerate(crc32_blocks(address + low - base, high - low), first):
        if block < len(checksums) and crc != checksums[block]:
            result.bad[block] = crc
    return high


def _damage(payload: StoredPayload, found: _Found) -> Iterator[Damaged]:
    damaged = partial(Damaged, file=payload.file, name=payload.name)
    end, checksums = payload.offset + payload.nbytes, payload.checksums
    if checksums is not None:
        if len(checksums) != -(-payload.nbytes // BLOCK):
            yield damaged(f"{len(checksums)} block checksums for {payload.nbytes} bytes")
        for block, crc in sorted(found.bad.items()):
            yield damaged(describe_mismatch(crc, checksums[block]), block=block)
    if found.problem is not None:
        yield damaged(found.problem)
    elif found.end is not None:
        yield damaged(describe_short_file(found.end, end))
    elif checksums is None and payload.crc is not None:
        crc = 0
        for low in sorted(found.crcs):
            crc = combine(crc, found.crcs[low], min(_MAX_READ_BYTES, end - low))
        if crc != payload.crc:
            yield damaged(describe_mismatch(crc, payload.crc))
