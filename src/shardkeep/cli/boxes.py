"""Boxes in the notation of the command: `0:4,:,7`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from math import prod

from shardkeep.cli.terminal import CommandError
from shardkeep.types import Box

__all__ = ["corner", "parse", "slabs"]

_NUMBER = r"-?\d{1,18}"
_PART = re.compile(rf"(?P<one>{_NUMBER})|(?P<first>{_NUMBER})?:(?P<end>{_NUMBER})?")


def parse(text: str, shape: tuple[int, ...]) -> Box:
    """Return the box that a text such as `0:4,:,-1` means in a tensor of that shape.

    Each part is a range or a single position, as in a Python slice without steps: negative numbers
    count from the end, and dimensions that are not named are whole. Unlike in Python, a range
    that reaches out of the tensor is an error.

    Raises:
        CommandError: not a box, more parts than dimensions, or it reaches out of the tensor.
    """
    parts = text.split(",") if text.strip() else []
    if len(parts) > len(shape):
        raise CommandError(
            f"box {text!r} has {len(parts)} parts, but the tensor's shape is {list(shape)}", 2
        )
    ranges = [_range(part, size, text) for part, size in zip(parts, shape, strict=False)]
    ranges += [(0, size) for size in shape[len(parts) :]]
    return Box(tuple(a for a, _ in ranges), tuple(b - a for a, b in ranges))


def _range(part: str, size: int, text: str) -> tuple[int, int]:
    found = _PART.fullmatch(part.strip())
    if found is None:
        raise CommandError(f"box {text!r}: {part!r} is not a range; write 0:4, 4:, :, or 7", 2)
    if found["one"] is not None:
        first = _from_end(int(found["one"]), size)
        end = first + 1
    else:
        first = _from_end(int(found["first"] or 0), size)
        end = size if found["end"] is None else _from_end(int(found["end"]), size)
    if not 0 <= first <= end <= size:
        raise CommandError(f"box {text!r}: {part!r} reaches out of a dimension of size {size}", 2)
    return first, end


def _from_end(number: int, size: int) -> int:
    return number + size if number < 0 else number


def corner(box: Box, most: int) -> Box:
    """Return the first `most` elements or fewer of a box; wider in the last two dimensions."""
    sizes = list(box.sizes)
    for dim in reversed(range(len(sizes))):
        sizes[dim] = min(sizes[dim], 8 if dim >= len(sizes) - 2 else 2, most)
        most = max(1, most // max(1, sizes[dim]))
    return Box(box.offsets, tuple(sizes))


def slabs(box: Box, most: int) -> Iterator[Box]:
    """Yield parts of a box, of at most `most` elements each, in order; rows that fit stay whole."""
    dim = 0
    while dim < box.ndim and prod(box.sizes[dim + 1 :]) > most:
        dim += 1
    if dim == box.ndim:  # a scalar
        yield box
        return
    step = max(1, most // max(1, prod(box.sizes[dim + 1 :])))
    outer = [range(o, o + s) for o, s in zip(box.offsets[:dim], box.sizes[:dim], strict=True)]
    for index in product(*outer):
        end = box.offsets[dim] + box.sizes[dim]
        for start in range(box.offsets[dim], end, step):
            sizes = ((1,) * dim) + (min(step, end - start),) + box.sizes[dim + 1 :]
            yield Box((*index, start, *box.offsets[dim + 1 :]), sizes)
