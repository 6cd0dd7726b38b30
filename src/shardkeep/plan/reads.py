"""Byte ranges that hold a box of a stored chunk, and their layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardkeep.errors import FormatError
from shardkeep.types import I64, Box

__all__ = ["ByteRuns", "ChunkSource", "block_range", "byte_runs", "split"]

_MAX_RUNS = 1 << 24
"""Limit for the runs of one box: hostile strides must not make columns that fill the memory."""


@dataclass(frozen=True, slots=True, eq=False)
class ChunkSource:
    """Location of one stored chunk and of each of its elements.

    Attributes:
        file: the file, relative to the checkpoint.
        start: where the chunk's first element starts in that file, in bytes.
        strides: bytes from one element to the next in each dimension; 0 where they share memory.
        sizes: the chunk's extents, in elements.
        itemsize: bytes of an element.
        payload: first byte and number of bytes of the stored payload that holds the chunk.
        checksums: CRC-32 of each block of the payload, if known.
        data: bytes that are in memory already (a decompressed item). Then `start` and `payload`
            count from the first of them, not from the start of the file.
        crc: CRC-32 of the whole payload, if it is known but those of its blocks are not. That of
            `data` has been compared already.
    """

    file: str
    start: int
    strides: tuple[int, ...]
    sizes: tuple[int, ...]
    itemsize: int
    payload: tuple[int, int]
    checksums: NDArray[np.uint32] | None = None
    data: memoryview | None = None
    crc: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ByteRuns:
    """R byte ranges of the same layout, each for one position in the outer dimensions of a box.

    Attributes:
        starts: [R] first byte of each run, in C order of the outer dimensions.
        span: bytes from the first to the last one of a run, gaps included.
        outer: the dimensions that are iterated, ascending.
        sizes: extents of the other dimensions, in their order.
        strides: bytes between elements in those dimensions.
        gapless: whether a run consists of its elements in C order only.
    """

    starts: I64
    span: int
    outer: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    gapless: bool


def byte_runs(source: ChunkSource, box: Box, gap: int) -> ByteRuns:
    """Return the byte ranges that hold a box of a chunk, with near neighbours merged.

    Args:
        source: the chunk.
        box: the part that is needed, relative to the chunk, not empty.
        gap: largest gap between needed bytes that is read and discarded rather than skipped.

    Raises:
        FormatError: the chunk exceeds its payload, or the box is empty or exceeds the chunk.
    """
    base = _first_byte(source, box)
    starts = np.array([base], dtype=np.int64)
    make = _run_layout(box.sizes, source.strides, source.itemsize, gap)
    if prod(box.sizes[d] for d in make.outer) > _MAX_RUNS:
        raise FormatError(
            f"the box has more than {_MAX_RUNS} separate byte ranges", file=source.file
        )
    for d in make.outer:
        steps = np.arange(box.sizes[d], dtype=np.int64) * source.strides[d]
        starts = (starts[:, None] + steps).reshape(-1)
    return ByteRuns(starts, make.span, make.outer, make.sizes, make.strides, make.gapless)


class _RunLayout(NamedTuple):
    """Layout that all runs of a box share; see `ByteRuns`."""

    span: int
    outer: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    gapless: bool


@lru_cache(maxsize=1024)
def _run_layout(
    sizes: tuple[int, ...], strides: tuple[int, ...], itemsize: int, gap: int
) -> _RunLayout:
    """Return the layout of the runs of a box. Cached, since most boxes have the sizes of others."""
    if _gapless(sizes, strides, itemsize):
        return _RunLayout(prod(sizes) * itemsize, (), sizes, strides, True)
    span, inner = _inner(sizes, strides, itemsize, gap)
    outer = tuple(d for d in range(len(sizes)) if d not in inner)
    kept = tuple(sizes[d] for d in sorted(inner))
    steps = tuple(strides[d] for d in sorted(inner))
    return _RunLayout(span, outer, kept, steps, _gapless(kept, steps, itemsize))


def split(
    source: ChunkSource, box: Box, gap: int, limit: int, block: int = 1
) -> Iterator[tuple[Box, ByteRuns]]:
    """Split a box into parts whose runs span at most `limit` bytes each, or are one element.

    Runs are rounded out to whole blocks of the payload before they are measured. Where possible,
    parts are cut between blocks, so that few blocks are read twice. Requests that read in place can
    be cut at any byte and need no such parts.

    Args:
        source: the chunk.
        box: the part that is needed, relative to the chunk.
        gap: largest gap between needed bytes that is read rather than skipped.
        limit: bytes, a multiple of `block` and at least four times as much.
        block: size of a block of the payload; 1 if blocks do not matter.
    """
    found = byte_runs(source, box, gap)
    if found.outer and block > 1:
        # Each run has another offset from the blocks; this leaves space for the worst one.
        limit, block = limit - 2 * block, 1
    start = int(found.starts[0]) - source.payload[0]
    low = start - start % block
    spread = [d for d in range(box.ndim) if box.sizes[d] > 1 and source.strides[d] > 0]
    inner = [d for d in spread if d not in found.outer]
    if start + found.span <= low + limit or not inner:
        yield box, found
        return
    widest = max(inner, key=lambda d: source.strides[d])
    stride = source.strides[widest]
    below = found.span - (box.sizes[widest] - 1) * stride
    place = widest - sum(d < widest for d in found.outer)
    at = 0
    while at < box.sizes[widest]:
        count = min(_step(start + at * stride, stride, below, limit, block), box.sizes[widest] - at)
        part = Box(
            _with(box.offsets, widest, box.offsets[widest] + at), _with(box.sizes, widest, count)
        )
        if count > 1 or below <= limit - 2 * (block - 1):
            sizes = _with(found.sizes, place, count)
            gapless = _gapless(sizes, found.strides, source.itemsize)
            starts, span = found.starts + at * stride, below + (count - 1) * stride
            yield part, ByteRuns(starts, span, found.outer, sizes, found.strides, gapless)
        else:
            yield from split(source, part, gap, limit, block)
        at += count


def _with(values: tuple[int, ...], at: int, value: int) -> tuple[int, ...]:
    return (*values[:at], value, *values[at + 1 :])


def _step(start: int, stride: int, below: int, limit: int, block: int) -> int:
    """Return how many ranges of `below` bytes, `stride` apart, are read at a time: at least one.

    That is as many as fit, or a few less if they end at the end of a block.
    """
    low = start - start % block
    if block > 1:
        for end in range(low + limit, low, -block):
            step = 1 + (end - start - below) // stride
            if step > 0 and start + step * stride >= end:
                return step
    return max(1, 1 + (low + limit - start - below) // stride)


def block_range(start: int, stop: int, payload: tuple[int, int], block: int) -> tuple[int, int]:
    """Return the range from `start` to `stop`, rounded out to whole blocks of its payload."""
    first, nbytes = payload
    low = start - (start - first) % block
    high = stop + (first - stop) % block
    return low, min(high, first + nbytes)


def _first_byte(source: ChunkSource, box: Box) -> int:
    """Return the first byte of a box, after checking that the chunk is inside its payload."""
    if len(box.sizes) != len(source.sizes):
        raise FormatError(
            f"box {box} has other dimensions than a chunk of {source.sizes}", file=source.file
        )
    start, first, last = source.start, source.start, source.start + source.itemsize
    for offset, wanted, size, stride in zip(
        box.offsets, box.sizes, source.sizes, source.strides, strict=True
    ):
        if offset < 0 or wanted < 1 or offset + wanted > size:
            raise FormatError(f"box {box} is not in a chunk of {source.sizes}", file=source.file)
        if stride < 0:
            raise FormatError(f"negative stride {stride}", file=source.file)
        start += offset * stride
        last += (size - 1) * stride
    begin, nbytes = source.payload
    if first < begin or last > begin + nbytes:
        raise FormatError(
            f"elements at bytes {first} to {last} are outside the payload, "
            f"which is at {begin} to {begin + nbytes}",
            file=source.file,
        )
    return start


def _gapless(sizes: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    expected = itemsize
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _inner(
    sizes: tuple[int, ...], strides: tuple[int, ...], itemsize: int, gap: int
) -> tuple[int, set[int]]:
    """Return the bytes of a run and the dimensions in it.

    These are the dimensions with the smallest strides, as long as the gaps are small.
    """
    span, inner = itemsize, set()
    for d in sorted(range(len(sizes)), key=lambda d: strides[d]):
        if sizes[d] > 1:
            if strides[d] - span > gap:
                break
            span += (sizes[d] - 1) * strides[d]
        inner.add(d)
    inner.update(d for d in range(len(sizes)) if sizes[d] == 1)
    return span, inner
