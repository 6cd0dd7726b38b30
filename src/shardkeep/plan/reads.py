"""From a box of a stored chunk to the byte ranges that hold it, and how to place what comes."""

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

_MOST_RUNS = 1 << 24
"""Runs of one box at most: hostile strides must not make columns that fill the memory."""


@dataclass(frozen=True, slots=True, eq=False)
class ChunkSource:
    """One stored chunk: where each of its elements lies.

    Attributes:
        file: the file, relative to the checkpoint.
        start: where the chunk's first element starts in that file, in bytes.
        strides: bytes from one element to the next in each dimension; 0 where they share memory.
        sizes: the chunk's extents, in elements.
        itemsize: bytes of an element.
        payload: first byte and number of bytes of the stored payload that holds the chunk.
        checksums: CRC-32 of each block of the payload, if known.
        data: bytes that are in memory already (a decompressed item): `start` and `payload` count
            from their first one then, not from the file's.
        crc: CRC-32 of the whole payload, if that is known but not those of its blocks; of `data`,
            it was compared when they came.
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
    """R byte ranges of the same make. Each holds the box at one position of the outer dimensions.

    Attributes:
        starts: [R] first byte of each run, in C order of the outer dimensions.
        span: bytes from a run's first to its last one, gaps included.
        outer: the dimensions that are iterated, ascending.
        sizes: extents of the other dimensions, in their order.
        strides: bytes between elements in those.
        gapless: a run is its elements in C order, and nothing else.
    """

    starts: I64
    span: int
    outer: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    gapless: bool


def byte_runs(source: ChunkSource, box: Box, gap: int) -> ByteRuns:
    """The byte ranges that hold a box of the chunk, neighbours merged.

    Args:
        source: the chunk.
        box: what is wanted of it, relative to the chunk, not empty.
        gap: bytes between useful ones that are rather read and thrown away than skipped.

    Raises:
        FormatError: the chunk would reach out of its payload, or the box out of the chunk (or it is
            empty).
    """
    base = _first_byte(source, box)
    starts = np.array([base], dtype=np.int64)
    make = _make(box.sizes, source.strides, source.itemsize, gap)
    if prod(box.sizes[d] for d in make.outer) > _MOST_RUNS:
        raise FormatError("the chunk lies in too many scattered places", file=source.file)
    for d in make.outer:
        steps = np.arange(box.sizes[d], dtype=np.int64) * source.strides[d]
        starts = (starts[:, None] + steps).reshape(-1)
    return ByteRuns(starts, make.span, make.outer, make.sizes, make.strides, make.gapless)


class _Make(NamedTuple):
    """What the runs of a box have in common; see `ByteRuns`."""

    span: int
    outer: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    gapless: bool


@lru_cache(maxsize=1024)
def _make(sizes: tuple[int, ...], strides: tuple[int, ...], itemsize: int, gap: int) -> _Make:
    """Cached: most boxes of a state have the sizes of others."""
    if _gapless(sizes, strides, itemsize):
        return _Make(prod(sizes) * itemsize, (), sizes, strides, True)
    span, inner = _inner(sizes, strides, itemsize, gap)
    outer = tuple(d for d in range(len(sizes)) if d not in inner)
    kept = tuple(sizes[d] for d in sorted(inner))
    steps = tuple(strides[d] for d in sorted(inner))
    return _Make(span, outer, kept, steps, _gapless(kept, steps, itemsize))


def split(
    source: ChunkSource, box: Box, gap: int, limit: int, block: int = 1
) -> Iterator[tuple[Box, ByteRuns]]:
    """Parts of a box whose runs span at most `limit` bytes each (or are one element).

    The bytes of a run are rounded out to whole blocks of the payload before they are counted, and
    parts are cut between blocks where that is possible, so that few blocks are read twice. `limit`
    is a multiple of `block`, and at least four times as much.

    What goes straight into memory can be cut at any byte, and needs no such parts.
    """
    found = byte_runs(source, box, gap)
    if found.outer and block > 1:
        # Each run lies in another way to the blocks: there is room for the worst one.
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
    """How many ranges of `below` bytes, `stride` apart, are read at once: at least one.

    As many as fit, or a few less if that ends at the end of a block.
    """
    low = start - start % block
    if block > 1:
        for end in range(low + limit, low, -block):
            step = 1 + (end - start - below) // stride
            if step > 0 and start + step * stride >= end:
                return step
    return max(1, 1 + (low + limit - start - below) // stride)


def block_range(start: int, stop: int, payload: tuple[int, int], block: int) -> tuple[int, int]:
    """The bytes from `start` to `stop`, rounded out to whole blocks of the payload they lie in."""
    first, nbytes = payload
    low = start - (start - first) % block
    high = stop + (first - stop) % block
    return low, min(high, first + nbytes)


def _first_byte(source: ChunkSource, box: Box) -> int:
    """Where the box starts, once the whole chunk is known to lie inside its payload."""
    if len(box.sizes) != len(source.sizes):
        raise FormatError(f"box {box} is not one of a chunk of {source.sizes}", file=source.file)
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
            f"elements at bytes {first} to {last} lie outside the payload, "
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
    """The dimensions that one read spans, and its bytes: the closest ones, while gaps are small."""
    span, inner = itemsize, set()
    for d in sorted(range(len(sizes)), key=lambda d: strides[d]):
        if sizes[d] > 1:
            if strides[d] - span > gap:
                break
            span += (sizes[d] - 1) * strides[d]
        inner.add(d)
    inner.update(d for d in range(len(sizes)) if sizes[d] == 1)
    return span, inner
