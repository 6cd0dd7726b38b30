"""Rounds in which boxes pass in parts through memory that is smaller than the boxes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from shardkeep.plan.cutting import cut
from shardkeep.settings import ALIGNMENT
from shardkeep.types import Box

__all__ = ["RoundPart", "plan_rounds"]

_MOST = 4 << 20
"""Size limit of a part: small enough that threads can share a round, and large enough that the two
blocks at its ends, which its neighbours read again, hardly count."""


class RoundPart(NamedTuple):
    """Part of a box, and the memory that it takes for a round.

    Attributes:
        row: number of the box.
        inside: the part, relative to the box.
        start, nbytes: its range in the memory; `start` is a multiple of `ALIGNMENT`.
    """

    row: int
    inside: Box
    start: int
    nbytes: int


def plan_rounds(boxes: Iterable[tuple[int, Box, int]], room: int) -> list[list[RoundPart]]:
    """Cut boxes into parts, and distribute these over as few rounds as their order allows.

    Rounds use the two halves of the memory in turn: one is processed while the other is filled.

    Args:
        boxes: number, box and element size of each box. Empty boxes have no part.
        room: bytes of memory, a multiple of 2 * `ALIGNMENT`. No element may be larger than half.
    """
    half = room // 2
    rounds: list[list[RoundPart]] = []
    end = half
    for row, inside, nbytes in _cut(boxes, min(_MOST, half)):
        start = -(-end // ALIGNMENT) * ALIGNMENT
        if start + nbytes > half:
            rounds.append([])
            start = 0
        rounds[-1].append(RoundPart(row, inside, start + (len(rounds) - 1) % 2 * half, nbytes))
        end = start + nbytes
    return rounds


def _cut(boxes: Iterable[tuple[int, Box, int]], most: int) -> Iterator[tuple[int, Box, int]]:
    """Yield the number of the box, the part and its bytes, for each part."""
    for row, box, itemsize in boxes:
        for inside in cut(Box.whole(box.sizes), itemsize, most) if box.numel else ():
            yield row, inside, inside.numel * itemsize
