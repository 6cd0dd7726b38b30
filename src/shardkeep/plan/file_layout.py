"""Where every byte of a data file will be, before there is one: items, payloads, windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardkeep.settings import ALIGNMENT, BLOCK, PAGE
from shardkeep.types import I64, Frame, Framing

__all__ = ["MIN_IN_PLACE_BYTES", "MIN_WINDOW_BYTES", "FileLayout", "lay_out", "run_ends"]

MIN_WINDOW_BYTES = 4 * BLOCK
"""Bytes that a window may be limited to at least, so that there is always a place to cut."""

MIN_IN_PLACE_BYTES = 2 * BLOCK
"""Bytes of a payload from which on it may start elsewhere than at a multiple of `PAGE`."""


@dataclass(frozen=True, slots=True, eq=False)
class FileLayout:
    """A file of N items, cut into W windows, each of which can be made and written by itself.

    Attributes:
        nbytes: of the whole file.
        order: [N] rows in the order in which they lie in the file.
        item: [N] where the item starts, in bytes.
        payload: [N] where its payload starts.
        length: [N] bytes of the item.
        frame: [N] which of `frames` lies around the payload; -1 for a bare one.
        frames: those that differ.
        cuts: [W + 1] window w is the bytes cuts[w] to cuts[w + 1]. Cuts are multiples of `PAGE`
            (but the last one), and lie less than one before a block of a payload begins, inside
            of it, or where an empty one is; in bare ones anywhere.
    """

    nbytes: int
    order: I64
    item: I64
    payload: I64
    length: I64
    frame: I64
    frames: tuple[Frame, ...]
    cuts: I64


def lay_out(
    nbytes: I64, kind: I64, framings: Sequence[Framing | None], past: I64, window: int
) -> FileLayout:
    """Lay items out one after the other: large ones first, then small ones by kind, then bare ones.

    Payloads of a block and more start at a multiple of `PAGE`, or so many bytes past one as they
    do in memory, and so does a small one now and then: there the file can be cut, and written past
    the page cache.

    Args:
        nbytes: [N] bytes of each payload.
        kind: [N] which of `framings` makes its frame.
        framings: None where a payload is an item as it is.
        past: [N] bytes past a multiple of `PAGE` where the payload is to start: less than a `PAGE`,
            a multiple of `ALIGNMENT`, and 0 for payloads of less than `MIN_IN_PLACE_BYTES`.
        window: bytes of a window at most, `MIN_WINDOW_BYTES` or more.

    Raises:
        ValueError: the window is too small, or a small payload is to start past a multiple.
    """
    if window < MIN_WINDOW_BYTES:
        raise ValueError(f"a window of {window} bytes is less than {MIN_WINDOW_BYTES}")
    if past[nbytes < MIN_IN_PLACE_BYTES].any():
        raise ValueError(f"a payload of less than {MIN_IN_PLACE_BYTES} bytes has no place to cut")
    bare = np.fromiter((framing is None for framing in framings), np.bool_, len(framings))[kind]
    place = np.where(bare, len(framings), np.where(nbytes < BLOCK, kind, -1))
    order = np.argsort(place, kind="stable")
    ends = run_ends(kind[order], nbytes[order]).tolist()
    kinds, sizes, pasts = (column[order].tolist() for column in (kind, nbytes, past))
    items, cutter, position = _Items(len(order)), _Cutter(window), 0
    while (at := items.count) < len(order):
        size, off, framing, start = sizes[at], pasts[at], framings[kinds[at]], position
        if framing is None:
            first = -(-start // PAGE) * PAGE
            cutter.add(first, start + size - first, PAGE)
            position = items.add(start, start, size, None)
            continue
        paged = size >= BLOCK or start - cutter.place >= window // 2
        frame = framing(start - off, paged)
        payload = start + len(frame.head)
        if off:  # before its first block there is its head, which is not to be cut
            cutter.add(payload - off + BLOCK, size - BLOCK, BLOCK)
        elif paged:
            cutter.add(payload, max(size, 1), BLOCK)  # also where there is no byte
        position = items.add(start, payload, size, frame)
        if not paged and (position - start) % ALIGNMENT == 0:
            unpaged = -(-(cutter.place + window // 2 - position) // (position - start))
            position = items.repeat(min(ends[at] - at - 1, max(0, unpaged)))
    return items.laid_out(order, cutter.finish(position))


def run_ends(*columns: I64) -> I64:
    """[N] for each row where the run of rows ends that are alike in all columns."""
    count = len(columns[0])
    last = np.ones(count, dtype=np.bool_)
    last[:-1] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    ends = np.flatnonzero(last) + 1
    return np.repeat(ends, np.diff(ends, prepend=0))


class _Items:
    """The columns of a layout of so many items, in the order of the file."""

    def __init__(self, total: int) -> None:
        self._table = np.empty((4, total), dtype=np.int64)  # item, payload, length, frame
        self._frames: dict[int, tuple[int, Frame]] = {}
        self.count = 0
        """Items so far."""

    def add(self, start: int, payload: int, size: int, frame: Frame | None) -> int:
        """Add an item; returns where it ends."""
        end = payload + size + (frame.tail_length if frame else 0)
        number = -1 if frame is None else self._number(frame)
        self._table[:, self.count] = (start, payload, end - start, number)
        self.count += 1
        return end

    def repeat(self, count: int) -> int:
        """Add as many as the last one, each right behind the one before; returns where they end."""
        last = self._table[:, self.count - 1 : self.count]
        length = int(last[2, 0])
        step = np.array([[length], [length], [0], [0]])
        more = last + step * np.arange(1, count + 1)
        self._table[:, self.count : self.count + count] = more
        self.count += count
        return int(last[0, 0]) + (count + 1) * length

    def laid_out(self, order: NDArray[np.intp], cuts: Sequence[int]) -> FileLayout:
        """The columns in the order of the rows."""
        table = np.empty_like(self._table)
        table[:, order] = self._table
        item, payload, length, frame = table
        return FileLayout(
            nbytes=cuts[-1],
            order=order.astype(np.int64),
            item=item,
            payload=payload,
            length=length,
            frame=frame,
            frames=tuple(frame for _, frame in self._frames.values()),
            cuts=np.array(cuts, dtype=np.int64),
        )

    def _number(self, frame: Frame) -> int:
        # Frames of one kind are most often one object; to compare their bytes would take longer.
        return self._frames.setdefault(id(frame), (len(self._frames), frame))[0]


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
