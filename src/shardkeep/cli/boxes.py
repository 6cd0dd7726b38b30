"""Boxes as a user writes them: `0:4,:,7`."""

from __future__ import annotations

import re

from shardkeep.types import Box

__all__ = ["corner", "parse"]

_PART = re.compile(r"\s*(?:(?P<one>[+-]?\d{1,18})|(?P<first>[+-]?\d{1,18})?\s*:\s*(?P<end>[+-]?\d{1,18})?)\s*")


def parse(text: str, shape: tuple[int, ...]) -> Box:
    """The box that a text such as `0:4,:,-1` means in a tensor of that shape.

    Each part is a range or a single position, as in a Python slice without steps: negative numbers
    count from the end, and dimensions that are not named are whole. Unlike in Python, what leaves
    the tensor is an error.

    Raises:
        ValueError: not a box, more parts than dimensions, or it leaves the tensor.
    """
    parts = [part for part in text.strip().strip("[]").split(",")] if text.strip() else []
    if len(parts) > len(shape):
        raise ValueError(
            f"box {text!r} has {len(parts)} parts, the tensor {len(shape)} dimensions: {list(shape)}"
        )
    ranges = [_range(part, size, text) for part, size in zip(parts, shape, strict=False)]
    ranges += [(0, size) for size in shape[len(parts) :]]
    return Box(tuple(a for a, _ in ranges), tuple(b - a for a, b in ranges))


def _range(part: str, size: int, text: str) -> tuple[int, int]:
    found = _PART.fullmatch(part)
    if found is None:
        raise ValueError(f"box {text!r}: {part!r} is no range (write 0:4, 4:, :, or 7)")
    if found["one"] is not None:
        first = _from_end(int(found["one"]), size)
        end = first + 1
    else:
        first = _from_end(int(found["first"] or 0), size)
        end = size if found["end"] is None else _from_end(int(found["end"]), size)
    if not 0 <= first <= end <= size:
        raise ValueError(f"box {text!r}: {part!r} leaves a dimension of {size}")
    return first, end


def _from_end(number: int, size: int) -> int:
    return number + size if number < 0 else number


def corner(box: Box, most: int) -> Box:
    """The leading part of a box with at most `most` elements; the last dimensions get the most."""
    sizes = list(box.sizes)
    edge = 8
    while True:
        cut = [min(size, edge if dim >= len(sizes) - 2 else 2) for dim, size in enumerate(sizes)]
        small = Box(box.offsets, tuple(cut))
        if small.numel <= most or edge == 1:
            return small
        edge -= 1
