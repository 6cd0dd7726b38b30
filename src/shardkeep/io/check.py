"""Payloads against their digests, streaming: all damage is collected."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from shardkeep import knobs
from shardkeep.contracts import Progress, Store
from shardkeep.errors import Damaged
from shardkeep.io.digest import combine, crc32
from shardkeep.io.fetch import MISSING, Read, Want, fetch, gather, mismatch, too_short
from shardkeep.io.pool import Meter, parallel
from shardkeep.knobs import BLOCK

__all__ = ["Payload", "verify_payloads"]

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Payload:
    """Stored bytes, and what is known of them: a digest for each block, or one for all.

    Attributes:
        name: the tensor or object, for errors.
        file, offset, nbytes: where they lie, in bytes.
        digests: CRC-32 of each `BLOCK` bytes. They win over `crc`, as they tell the place.
        crc: CRC-32 of all.
    """

    name: str
    file: str
    offset: int
    nbytes: int
    digests: NDArray[np.uint32] | None = None
    crc: int | None = None


@dataclass(slots=True)
class _Found:
    """What came out for one payload. Threads put in values of their own pieces only."""

    crcs: dict[int, int]
    bad: list[tuple[int, int]]
    end: int | None = None
    problem: str | None = None


def verify_payloads(
    store: Store,
    payloads: Sequence[Payload],
    *,
    threads: int,
    progress: Progress | None = None,
) -> list[Damaged]:
    """Check all payloads, about 1 MiB at a time; those without a digest only for being there.

    Returns:
        All damage, in the order of the payloads: each block that does not match, each payload that
        does not, those that the file is too short for, those that can't be read (EIO).

    Raises:
        OSError: anything else that keeps files from being read: it tells nothing about them.
    """
    found = [_Found({}, []) for _ in payloads]
    size = lru_cache(maxsize=None)(partial(_size, store))
    wants: list[Want] = []
    for row, payload in enumerate(payloads):
        # What a file does not hold is not planned for: a length may be any number.
        end = payload.offset + payload.nbytes
        there = min(end, size(payload.file))
        if there < 0:
            found[row].problem = MISSING
        elif there < end:
            found[row].end = there
        for at in range(payload.offset, there, _PIECE):
            wants.append(Want(payload.file, at, min(at + _PIECE, end), row))
    jobs = list(gather(wants, knobs.gap(), _PIECE))
    meter = Meter(progress, "verify", sum(job.high - job.low for job in jobs))
    parallel(jobs, partial(_work, store, payloads, found, meter), threads)
    return [damage for pair in zip(payloads, found, strict=True) for damage in _damage(*pair)]


def _size(store: Store, file: str) -> int:
    """Bytes of a file; -1 if it is missing."""
    try:
        return store.size(file)
    except FileNotFoundError:
        return -1


def _work(
    store: Store,
    payloads: Sequence[Payload],
    found: Sequence[_Found],
    meter: Meter,
    jobs: Iterator[Read],
) -> None:
    space = np.empty(_PIECE, dtype=np.uint8)
    for job in jobs:
        view = space.data[: job.high - job.low]
        end, problem = job.low, None
        try:
            end += fetch(store, job.file, job.low, view, None)
        except Damaged as error:
            problem = error.what
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            problem = str(error)
        for want in job.wants:
            result = found[want.use]
            if problem is not None:
                result.problem = problem
            if want.high > end:
                result.end = end if result.end is None else min(end, result.end)
            high = min(want.high, end)
            if want.low < high:
                _take(payloads[want.use], result, view[want.low - job.low : high - job.low], want)
        meter.add(job.high - job.low)


def _take(payload: Payload, result: _Found, view: memoryview, want: Want) -> None:
    """Digest one piece; where the file ended early, only blocks that are whole say something."""
    whole = len(view) == want.high - want.low
    if payload.digests is None:
        if payload.crc is not None and whole:
            result.crcs[want.low] = crc32(view)
        return
    first = (want.low - payload.offset) // BLOCK
    for block, at in enumerate(range(0, len(view), BLOCK), first):
        part = view[at : at + BLOCK]
        if len(part) < BLOCK and not whole:
            return
        crc = crc32(part)
        if block < len(payload.digests) and crc != payload.digests[block]:
            result.bad.append((block, crc))


def _damage(payload: Payload, found: _Found) -> Iterator[Damaged]:
    damaged = partial(Damaged, file=payload.file, name=payload.name)
    end, digests = payload.offset + payload.nbytes, payload.digests
    if digests is not None:
        if len(digests) != -(-payload.nbytes // BLOCK):
            yield damaged(f"{len(digests)} block digests for {payload.nbytes} bytes")
        for block, crc in sorted(found.bad):
            yield damaged(mismatch(crc, digests[block]), block=block)
    if found.problem is not None:
        yield damaged(found.problem)
    elif found.end is not None:
        yield damaged(too_short(found.end, end))
    elif digests is None and payload.crc is not None:
        crc = 0
        for low in sorted(found.crcs):
            crc = combine(crc, found.crcs[low], min(_PIECE, end - low))
        if crc != payload.crc:
            yield damaged(mismatch(crc, payload.crc))
