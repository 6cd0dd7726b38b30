"""Boxes of stored chunks into memory: few reads, digests checked, bytes put where they belong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardkeep import knobs
from shardkeep.contracts import Progress, Store
from shardkeep.errors import Damaged, FormatError
from shardkeep.io.check import Payload, verify_payloads
from shardkeep.io.digest import crc32
from shardkeep.io.fetch import Read, Want, fetch, gather
from shardkeep.io.pool import Meter, parallel
from shardkeep.knobs import BLOCK
from shardkeep.plan.reads import Runs, Source, block_range, runs, split
from shardkeep.types import Box

__all__ = ["Copy", "Payload", "ReadStats", "read_copies", "verify_payloads"]

_PIECE = 1 << 20
"""Bytes of one read straight into memory: they are still in the cache when they are checked."""

_MOST = 4 << 20
"""Bytes of one read into a buffer at most, however large the budget: it should stay cached, too."""

_LEAST = 4 * BLOCK
"""And at least: a small piece of a payload, rounded out to blocks on both sides, fits in."""

_STRAIGHT = 2 * BLOCK
"""A run of so many bytes goes straight into memory; smaller ones share reads with others."""


@dataclass(frozen=True, slots=True, eq=False)
class Copy:
    """A box of one stored chunk, and the memory that it goes to.

    Attributes:
        name: the tensor, for errors.
        source: where the chunk lies.
        box: what of it, relative to the chunk.
        into: an array of the box's sizes, writable, with any strides, and with any dtype of the
            stored item size: its bytes are replaced as they are.
    """

    name: str
    source: Source
    box: Box
    into: NDArray[Any]


@dataclass(frozen=True, slots=True)
class ReadStats:
    """Bytes read from the store, and bytes that the boxes have."""

    bytes_read: int
    bytes_needed: int


class _Use(NamedTuple):
    """What read bytes are for: one run, which starts at byte `start` and goes to `into`.

    `into` is plain bytes if `shape` is None; else the run has that shape, and these strides.
    """

    copy: Copy
    start: int
    into: NDArray[Any]
    shape: tuple[int, ...] | None
    strides: tuple[int, ...]


class _Straight(NamedTuple):
    """Bytes that are read right to where they belong: whole blocks, where there are digests."""

    file: str
    low: int
    high: int
    copy: Copy
    into: NDArray[np.uint8]


class _Limits(NamedTuple):
    """How reads are cut: `gap` between two of them, `span` of a run, `read` of one into a buffer."""

    gap: int
    read: int
    verify: bool


def read_copies(
    store: Store,
    copies: Sequence[Copy],
    *,
    verify: bool = True,
    threads: int,
    progress: Progress | None = None,
) -> ReadStats:
    """Fill all destinations, in parallel. Digested payloads are read and checked by whole blocks.

    Buffers take `knobs.buffer()` bytes in all at most (and 1 MiB a thread at least). After an error
    the content of the destinations is undefined; no thread goes on.

    Raises:
        Damaged: a block does not match its digest, or the file is missing or too short; the error
            names file and tensor.
        FormatError: a source contradicts itself.
        ValueError: a destination does not fit its box.
    """
    share = knobs.buffer() // max(1, threads)
    limits = _Limits(knobs.gap(), max(_LEAST, min(_MOST, share)), verify)
    copies = [copy for copy in copies if copy.box.numel]
    wants: list[Want[_Use]] = []
    jobs: list[_Straight | Read[_Use] | Copy] = []
    for copy in copies:
        _check_fit(copy)
        try:
            if copy.source.data is not None:
                jobs.append(copy)
            else:
                _plan(copy, limits, wants, jobs)
        except FormatError as error:
            raise error.within(place=f"tensor {copy.name!r}") from None
    jobs += gather(wants, limits.gap, limits.read)
    jobs.sort(key=_place)
    total = sum(_nbytes(job) for job in jobs)
    meter = Meter(progress, "read", total)
    parallel(jobs, partial(_work, store, limits, meter), threads)
    return ReadStats(
        bytes_read=sum(_nbytes(job) for job in jobs if not isinstance(job, Copy)),
        bytes_needed=sum(copy.box.numel * copy.source.itemsize for copy in copies),
    )


def _place(job: _Straight | Read[_Use] | Copy) -> tuple[str, int]:
    if isinstance(job, Copy):
        return job.source.file, job.source.start
    return job.file, job.low


def _nbytes(job: _Straight | Read[_Use] | Copy) -> int:
    if isinstance(job, Copy):
        return job.box.numel * job.source.itemsize
    return job.high - job.low


def _check_fit(copy: Copy) -> None:
    into, box, itemsize = copy.into, copy.box, copy.source.itemsize
    if into.shape != box.sizes or into.itemsize != itemsize:
        raise ValueError(
            f"{copy.name!r}: a box of sizes {list(box.sizes)} and items of {itemsize} bytes can't "
            f"go into an array of shape {list(into.shape)} and items of {into.itemsize}"
        )
    if not into.flags.writeable:
        raise ValueError(f"{copy.name!r}: its destination is read-only")


def _plan(
    copy: Copy,
    limits: _Limits,
    wants: list[Want[_Use]],
    jobs: list[_Straight | Read[_Use] | Copy],
) -> None:
    """What to read for one copy: into `jobs` what goes straight to memory, else into `wants`."""
    checked = limits.verify and copy.source.digests is not None
    # Runs nearer than a block would have to share blocks: they are read as one then.
    gap = max(limits.gap, BLOCK) if checked else limits.gap
    found = runs(copy.source, copy.box, gap)
    into = _words(copy.into, copy.source.itemsize)
    flat = found.gapless and into[_first(found, into.ndim)].flags.c_contiguous
    room = limits.read - (2 * BLOCK if checked else 0)
    if flat or found.span <= room:
        parts = iter([(copy.box, found)])
    else:
        parts = split(copy.source, copy.box, gap, room)
    for box, part in parts:
        target = into[box.relative_to(copy.box).slices] if box is not copy.box else into
        for use, length in _uses(copy, part, target, flat):
            if flat and length >= _STRAIGHT:
                _plan_straight(use, length, checked, wants, jobs)
            else:
                wants.append(_want(use, use.start, use.start + length, checked))


def _uses(copy: Copy, found: Runs, into: NDArray[Any], flat: bool) -> Iterator[tuple[_Use, int]]:
    """The runs, each with the part of the destination that is its own, and its bytes."""
    outer = [into.shape[d] for d in found.outer]
    place: list[int | slice] = [slice(None)] * into.ndim
    for start, index in zip(found.starts.tolist(), np.ndindex(*outer), strict=True):
        for d, i in zip(found.outer, index, strict=True):
            place[d] = i
        target = into[(*place, ...)]
        if flat:
            yield _Use(copy, start, target.reshape(-1).view(np.uint8), None, ()), found.span
        else:
            yield _Use(copy, start, target, found.sizes, found.strides), found.span


def _first(found: Runs, ndim: int) -> tuple[Any, ...]:
    return (*(0 if d in found.outer else slice(None) for d in range(ndim)), ...)


def _want(use: _Use, low: int, high: int, checked: bool) -> Want[_Use]:
    source = use.copy.source
    if checked:
        low, high = block_range(low, high, source.payload, BLOCK)
    return Want(source.file, low, high, use)


def _plan_straight(
    use: _Use,
    length: int,
    checked: bool,
    wants: list[Want[_Use]],
    jobs: list[_Straight | Read[_Use] | Copy],
) -> None:
    """Whole blocks go straight to memory; what is left at both ends goes through a buffer."""
    source, start, stop = use.copy.source, use.start, use.start + length
    low, high = start, stop
    if checked:
        first, nbytes = source.payload
        low += (first - start) % BLOCK
        if stop < first + nbytes:
            high -= (stop - first) % BLOCK
    for edge_low, edge_high in ((start, low), (high, stop)):
        if edge_low < edge_high:
            target = use.into[edge_low - start : edge_high - start]
            edge = use._replace(start=edge_low, into=target)
            wants.append(_want(edge, edge_low, edge_high, checked))
    for at in range(low, high, _PIECE):
        end = min(at + _PIECE, high)
        jobs.append(_Straight(source.file, at, end, use.copy, use.into[at - start : end - start]))


def _work(
    store: Store,
    limits: _Limits,
    meter: Meter,
    jobs: Iterator[_Straight | Read[_Use] | Copy],
) -> None:
    """One thread: take jobs, with a buffer of its own for those that need one."""
    space: NDArray[np.uint8] | None = None
    for job in jobs:
        if isinstance(job, _Straight):
            done = fetch(store, job.file, job.low, memoryview(job.into), job.copy.name)
            if done < job.high - job.low:
                raise _too_short(job.file, job.low + done, job.high, job.copy.name)
            if limits.verify:
                _check(job.copy, job.into, job.low, job.low, job.high)
        elif isinstance(job, Copy):
            _from_memory(job, limits)
        else:
            if space is None:
                space = np.empty(limits.read, dtype=np.uint8)
            _read(store, job, space[: job.high - job.low], limits)
        meter.add(_nbytes(job))


def _read(store: Store, job: Read[_Use], space: NDArray[np.uint8], limits: _Limits) -> None:
    done = fetch(store, job.file, job.low, memoryview(space), job.wants[0].use.copy.name)
    end = job.low + done
    for want in job.wants:
        if want.high > end:
            raise _too_short(job.file, end, want.high, want.use.copy.name)
    checked: dict[int, int] = {}
    for want in job.wants:
        use = want.use
        if limits.verify and use.copy.source.digests is not None:
            # Wants come sorted, so that blocks up to some byte of a payload are checked already.
            payload = use.copy.source.payload[0]
            low = max(want.low, checked.get(payload, 0))
            _check(use.copy, space, job.low, low, want.high)
            checked[payload] = max(low, want.high)
        _place_bytes(use, space, job.low)


def _place_bytes(use: _Use, space: NDArray[np.uint8], low: int) -> None:
    """Put one run where it belongs, from `space`, which holds the bytes from `low` on."""
    at = use.start - low
    if use.shape is None:
        use.into[:] = space[at : at + len(use.into)]
    else:
        use.into[...] = np.ndarray(use.shape, use.into.dtype, space, at, use.strides)


def _check(copy: Copy, space: NDArray[np.uint8], base: int, low: int, high: int) -> None:
    """Compare the payload's blocks from byte `low` to `high` with their digests, if it has any."""
    source = copy.source
    if source.digests is None or low >= high:
        return
    first, nbytes = source.payload
    if len(source.digests) != -(-nbytes // BLOCK):
        raise FormatError(
            f"{len(source.digests)} block digests for a payload of {nbytes} bytes",
            file=source.file,
            place=f"tensor {copy.name!r}",
        )
    view = memoryview(space)
    last = first + nbytes
    for block in range((low - first) // BLOCK, -(-(high - first) // BLOCK)):
        start = first + block * BLOCK
        crc = crc32(view[start - base : min(start + BLOCK, last) - base])
        if crc != source.digests[block]:
            raise Damaged(
                f"its bytes have CRC-32 {crc:08x}, not {int(source.digests[block]):08x}",
                file=source.file,
                name=copy.name,
                block=block,
            )


def _from_memory(copy: Copy, limits: _Limits) -> None:
    """Serve a copy whose payload is in memory already."""
    source = copy.source
    space = np.frombuffer(source.data or b"", dtype=np.uint8)
    first, nbytes = source.payload
    if first + nbytes > len(space):
        raise _too_short(source.file, len(space), first + nbytes, copy.name)
    try:
        found = runs(source, copy.box, _MOST)
    except FormatError as error:
        raise error.within(place=f"tensor {copy.name!r}") from None
    into = _words(copy.into, source.itemsize)
    for use, length in _uses(copy, found, into, flat=False):
        if limits.verify:
            low, high = block_range(use.start, use.start + length, source.payload, BLOCK)
            _check(copy, space, 0, low, high)
        _place_bytes(use, space, 0)


def _too_short(file: str, end: int, wanted: int, name: str) -> Damaged:
    return Damaged(f"the data ends at byte {end}, but goes on to {wanted}", file=file, name=name)


_WORDS: dict[int, Callable[..., Any] | str] = {}


def _words(into: NDArray[Any], itemsize: int) -> NDArray[Any]:
    """The same memory as plain words: copying must not interpret what it copies."""
    return into.view(f"u{itemsize}" if itemsize in (1, 2, 4, 8) else f"V{itemsize}")
