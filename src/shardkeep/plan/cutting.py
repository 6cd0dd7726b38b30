"""Boxes that are too large for one item, cut into several boxes."""

from __future__ import annotations

from itertools import pairwise, product
from math import prod

from shardkeep.types import Box

__all__ = ["cut"]


def cut(box: Box, itemsize: int, limit: int) -> tuple[Box, ...]:
    """Cut a box into boxes of at most `limit` bytes, in C order; a smaller box is returned as is.

    The outermost dimensions are cut, so that each part is contiguous in memory in C order. Further
    dimensions are cut only if a single row is larger than the limit. Parts are as even as rows
    allow. The result depends on the arguments alone, so replicas on other ranks are cut alike.

    Args:
        box: the box to cut.
        itemsize: bytes of an element, which may exceed the limit.
        limit: bytes, at least 1.

    Returns:
        Boxes that tile `box`.
    """
    if box.numel * itemsize <= limit:
        return (box,)
    ndim = box.ndim
    inner = [prod(box.sizes[d + 1 :]) * itemsize for d in range(ndim)]
    last = next((d for d in range(ndim) if inner[d] <= limit), ndim - 1)
    most = [1] * last + [max(1, limit // inner[last])] if ndim else []
    sides = [_even_ranges(box.sizes[d], most[d]) for d in range(len(most))]
    return tuple(
        Box(
            tuple(o + start for o, (start, _) in zip(box.offsets, part, strict=False))
            + box.offsets[len(part) :],
            tuple(size for _, size in part) + box.sizes[len(part) :],
        )
        for part in product(*sides)
    )


def _even_ranges(size: int, most: int) -> list[tuple[int, int]]:
    """Return (start, length) of as few even stretches as possible, none longer than `most`."""
    count = -(-size // most)
    ends = [size * i // count for i in range(count + 1)]
    return [(a, b - a) for a, b in pairwise(ends)]
