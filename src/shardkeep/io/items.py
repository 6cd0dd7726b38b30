"""Small items, many at once: few steps of Python put what lies around their payloads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from shardkeep.types import Frame

__all__ = ["put_items"]

_ALIKE = 16
"""Items in a row of one frame and size from which on a template is worth it."""


def put_items(
    frames: Sequence[Frame],
    sizes: Sequence[int],
    crcs: Sequence[int],
    payloads: NDArray[np.uint8],
    into: NDArray[np.uint8],
) -> None:
    """Put N items one after the other.

    Args:
        frames: [N] what is around each.
        sizes: [N] bytes of the payloads.
        crcs: [N] CRC-32 of the payloads.
        payloads: their bytes, one after the other.
        into: as long as the items are, all of them together.
    """
    packed = np.array(crcs, dtype="<u4").view(np.uint8).reshape(-1, 4)
    taken = put = 0
    for first, last, alike in _runs(frames, sizes):
        if alike:
            frame, nbytes = frames[first], (last - first) * sizes[first]
            length = nbytes + (last - first) * (len(frame.head) + frame.tail_length)
            part, target = payloads[taken : taken + nbytes], into[put : put + length]
            _put_alike(frame, part, packed[first:last], target)
        else:
            nbytes = sum(sizes[first:last])
            part = payloads[taken : taken + nbytes]
            joined = _joined(frames[first:last], sizes[first:last], part, packed[first:last])
            length = len(joined)
            into.data[put : put + length] = joined
        taken, put = taken + nbytes, put + length


def _runs(frames: Sequence[Frame], sizes: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
    """First and last + 1 of items that are alike, and of those between them that are not."""
    kinds = np.array([list(map(id, frames)), sizes], dtype=np.int64)
    ends = np.flatnonzero((kinds[:, 1:] != kinds[:, :-1]).any(axis=0)) + 1
    mixed = 0
    for first, last in pairwise([0, *ends.tolist(), len(sizes)]):
        if last - first >= _ALIKE:
            if mixed < first:
                yield mixed, first, False
            yield first, last, True
            mixed = last
    if mixed < len(sizes):
        yield mixed, len(sizes), False


def _put_alike(
    frame: Frame, payloads: NDArray[np.uint8], crcs: NDArray[np.uint8], into: NDArray[np.uint8]
) -> None:
    """Items of one frame and size: a template, and what differs between them as columns of it."""
    payloads, items = payloads.reshape(len(crcs), -1), into.reshape(len(crcs), -1)
    start, end = len(frame.head), len(frame.head) + payloads.shape[1]
    first = end + len(frame.before)
    second = first + 4 + len(frame.between)
    items[:, :start] = _bytes(frame.head)
    items[:, start:end] = payloads
    items[:, end:] = _bytes(frame.tail(0))
    items[:, first : first + 4] = items[:, second : second + 4] = crcs


def _joined(
    frames: Sequence[Frame],
    sizes: Sequence[int],
    payloads: NDArray[np.uint8],
    crcs: NDArray[np.uint8],
) -> bytes:
    data, packed, end = payloads.data, crcs.tobytes(), 0
    parts: list[bytes | memoryview] = []
    for at, (frame, size) in enumerate(zip(frames, sizes, strict=True)):
        crc, begin, end = packed[4 * at : 4 * at + 4], end, end + size
        parts += (
            frame.head, data[begin:end], frame.before, crc, frame.between, crc, frame.after
        )  # fmt: skip
    return b"".join(parts)


def _bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, dtype=np.uint8)
