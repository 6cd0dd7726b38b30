"""Where every byte of a data file will be, before there is one: items, payloads, windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardkeep.knobs import BLOCK, PAGE
from shardkeep.types import I64, Frame, Framing

__all__ = ["Layout", "lay_out", "least_in_place", "smallest_window"]

smallest_window = 4 * BLOCK
"""Bytes that a window may be limited to at least, so that there is always a place to cut."""

least_in_place = 2 * BLOCK
"""Bytes of a payload from which on it may start elsewhere than at a multiple of `PAGE`."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A file of N items, cut into W windows, each of which can be made and written by itself.

    Attributes:
        nbytes: of the whole file.
        order: [N] rows in the order in which they lie in the file.
        item: [N] where the item starts, in bytes.
        payload: [N] where its payload starts.
        length: [N] bytes of the item.
        frames: what lies around each payload; None around a bare one.
        cuts: [W + 1] window w is the bytes cuts[w] to cuts[w + 1]. Cuts are multiples of `PAGE`
            (but the last one), and lie less than one before a block of a payload begins, inside
            of it; in bare ones anywhere.
    """

    nbytes: int
    order: I64
    item: I64
    payload: I64
    length: I64
    frames: tuple[Frame | None, ...]
    cuts: I64


def lay_out(nbytes: I64, framings: Sequence[Framing | None], past: I64, window: int) -> Layout:
    """Lay items out one after the other: large ones first, then small ones, then bare ones.

    Payloads of a block and more start at a multiple of `PAGE`, or so many bytes past one as they
    do in memory, and so does a small one now and then: there the file can be cut, and written past
    the page cache.

    Args:
        nbytes: [N] bytes of each payload.
        framings: what makes the frames; None for what is an item as it is.
        past: [N] bytes past a multiple of `PAGE` where the payload is to start: less than a `PAGE`,
            a multiple of `ALIGNMENT`, and 0 for payloads of less than `least_in_place`.
        window: bytes of a window at most, `smallest_window` or more.

    Raises:
        ValueError: the window is too small, or a small payload is to start past a multiple.
    """
    if window < smallest_window:
        raise ValueError(f"a window of {window} bytes is less than {smallest_window}")
    if past[nbytes < least_in_place].any():
        raise ValueError(f"a payload of less than {least_in_place} bytes has no place to cut")
    count = len(nbytes)
    bare = np.fromiter((framing is None for framing in framings), dtype=bool, count=count)
    order = np.lexsort([(nbytes < BLOCK) & ~bare, bare])
    sizes, pasts = nbytes.tolist(), past.tolist()
    item, payload, length = [0] * count, [0] * count, [0] * count
    frames: list[Frame | None] = [None] * count
    cutter = _Cutter(window)
    position = 0
    for row in order.tolist():
        size, framing, off = sizes[row], framings[row], pasts[row]
        item[row] = start = position
        if framing is None:
            first = -(-position // PAGE) * PAGE
            cutter.add(first, position + size - first, PAGE)
        else:
            paged = size >= BLOCK or position - cutter.place >= window // 2
            frames[row] = frame = framing(position - off, paged)
            start += len(frame.head)
            if off:  # before its first block there is its head, which is not to be cut
                cutter.add(start - off + BLOCK, size - BLOCK, BLOCK)
            elif paged:
                cutter.add(start, size, BLOCK)
            size += frame.tail_length
        payload[row] = start
        position = start + size
        length[row] = position - item[row]
    return Layout(
        nbytes=position,
        order=order.astype(np.int64),
        item=np.array(item, dtype=np.int64),
        payload=np.array(payload, dtype=np.int64),
        length=np.array(length, dtype=np.int64),
        frames=tuple(frames),
        cuts=np.array(cutter.finish(position), dtype=np.int64),
    )


class _Cutter:
    """Cuts as late as a window's limit allows, at places where it may."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._cuts = [0]
        self.place = 0
        """The last place so far where it may cut."""

    def add(self, first: int, span: int, step: int) -> None:
        """It may cut at `first`, and then every `step` bytes before `first + span`."""
        if not first:  # the file's own beginning
            first, span = step, span - step
        if span <= 0:
            return
        last = first + (span - 1) // step * step
        while last > (limit := self._cuts[-1] + self._window):
            here = first + (limit - first) // step * step if limit >= first else self.place
            self._cuts.append(here)
            self.place = here
        self.place = last

    def finish(self, end: int) -> list[int]:
        """All cuts of a file of `end` bytes."""
        if end - self._cuts[-1] > self._window:
            self._cuts.append(self.place)
        return [*self._cuts, end] if end else [0]
