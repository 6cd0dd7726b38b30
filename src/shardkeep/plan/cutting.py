"""Boxes that are too large for one item, cut into several."""

from __future__ import annotations

from itertools import pairwise, product
from math import prod

from shardkeep.types import Box

__all__ = ["cut"]


def cut(box: Box, itemsize: int, limit: int) -> tuple[Box, ...]:
    """Boxes that tile `box`, in C order, each of `limit` bytes at most; itself if it is no larger.

    The outermost dimensions are cut, so that each part of memory in C order is one stretch of it;
    further ones only where a single row is larger. Parts are as even as rows allow. The answer
    depends on the arguments alone: replicas on other ranks are cut alike.

    Args:
        box: what to cut.
        itemsize: bytes of an element; one element may be larger than the limit.
        limit: bytes, at least 1.
    """
    if box.numel * itemsize <= limit:
        return (box,)
    ndim = box.ndim
    inner = [prod(box.sizes[d + 1 :]) * itemsize for d in range(ndim)]
    last = next((d for d in range(ndim) if inner[d] <= limit), ndim - 1)
    most = [1] * last + [max(1, limit // inner[last])] if ndim else []
    sides = [_stretches(box.sizes[d], most[d]) for d in range(len(most))]
    return tuple(
        Box(
            tuple(o + start for o, (start, _) in zip(box.offsets, part, strict=False))
            + box.offsets[len(part) :],
            tuple(size for _, size in part) + box.sizes[len(part) :],
        )
        for part in product(*sides)
    )


def _stretches(size: int, most: int) -> list[tuple[int, int]]:
    """(start, length) of as few stretches as can be, even, none longer than `most`."""
    count = -(-size // most)
    ends = [size * i // count for i in range(count + 1)]
    return [(a, b - a) for a, b in pairwise(ends)]
