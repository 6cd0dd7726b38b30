"""Boxes that pass through memory that is smaller than they are: in parts, round after round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from shardkeep.plan.cutting import cut
from shardkeep.settings import ALIGNMENT
from shardkeep.types import Box

__all__ = ["RoundPart", "plan_rounds"]

_MOST = 4 << 20
"""Bytes of a part at most: as large as threads can share out a round, and as the two blocks at its
ends, which its neighbours read as well, hardly count."""


class RoundPart(NamedTuple):
    """Part of a box, and the bytes of the memory that it has for a round.

    Attributes:
        row: which box.
        inside: what of it, relative to it.
        start, nbytes: its bytes of the memory; `start` is a multiple of `ALIGNMENT`.
    """

    row: int
    inside: Box
    start: int
    nbytes: int


def plan_rounds(boxes: Iterable[tuple[int, Box, int]], room: int) -> list[list[RoundPart]]:
    """Cut boxes into parts, and share them out over as few rounds as their order allows.

    Rounds take turns in the two halves of the memory: what is in one is used while the other one is
    filled.

    Args:
        boxes: which one, the box, and the bytes of one of its elements. Empty ones have no part.
        room: bytes of the memory, a multiple of 2 * `ALIGNMENT`. No element is larger than half.
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
    """The parts, and their bytes."""
    for row, box, itemsize in boxes:
        for inside in cut(Box.whole(box.sizes), itemsize, most) if box.numel else ():
            yield row, inside, inside.numel * itemsize
