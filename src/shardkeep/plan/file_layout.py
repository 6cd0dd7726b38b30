"""Layout of a data file before it is written: offsets of items and payloads, and write windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardkeep.settings import ALIGNMENT, BLOCK, PAGE
from shardkeep.types import I64, Frame, Framing

__all__ = ["MIN_IN_PLACE_BYTES", "MIN_WINDOW_BYTES", "FileLayout", "lay_out", "run_ends"]

MIN_WINDOW_BYTES = 4 * BLOCK
"""Smallest limit for the size of a window. With less, a file might have no place to be cut at."""

MIN_IN_PLACE_BYTES = 2 * BLOCK
"""Smallest payload that may start at another place than a multiple of `PAGE`."""


@dataclass(frozen=True, slots=True, eq=False)
class FileLayout:
    """Layout of N items in a file that is cut into W windows.

    Each window can be made and written independently of the others.

    Attributes:
        nbytes: size of the file up to the end of the last item.
        order: [N] rows in the order in which their items are stored.
        item: [N] offset of each item in the file.
        payload: [N] offset of each payload in the file.
        length: [N] bytes of each item.
        frame: [N] position in `frames` of the frame around the payload; -1 for a payload that is an
            item without a frame.
        frames: the distinct frames.
        cuts: [W + 1] window w is the bytes cuts[w] to cuts[w + 1]. Every inner cut is a multiple of
            `PAGE`. In an item with a frame, a cut is less than a `PAGE` before a block of the
            payload begins, or at an empty payload. In an item without a frame, a cut can be at any
            page.
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
    nbytes: I64,
    kind: I64,
    framings: Sequence[Framing | None],
    past_page: I64,
    max_window_bytes: int,
    start: int = 0,
) -> FileLayout:
    """Lay items out one after the other and cut the file into windows.

    Large items come first, then small ones sorted by kind, then items without a frame in the given
    order. Payloads of a block or more start at a multiple of `PAGE`, or as many bytes past one as
    in memory, so that direct I/O can write them without a copy. Some small payloads start at a
    multiple of `PAGE`, too, so that the file can be cut there.

    Args:
        nbytes: [N] bytes of each payload.
        kind: [N] position in `framings` of the framing that makes each item's frame.
        framings: makes the frames of one kind; None for items without a frame.
        past_page: [N] bytes past a multiple of `PAGE` at which the payload must start: less than
            `PAGE`, a multiple of `ALIGNMENT`, and 0 for payloads below `MIN_IN_PLACE_BYTES`.
        max_window_bytes: size limit of a window, at least `MIN_WINDOW_BYTES`.
        start: offset of the first item in the file.

    Raises:
        ValueError: the window limit is too small, or a small payload has a `past_page`.
    """
    if max_window_bytes < MIN_WINDOW_BYTES:
        raise ValueError(
            f"windows must be limited to {MIN_WINDOW_BYTES} bytes or more, not {max_window_bytes}"
        )
    if past_page[nbytes < MIN_IN_PLACE_BYTES].any():
        raise ValueError(
            f"a payload of less than {MIN_IN_PLACE_BYTES} bytes must start at a multiple of {PAGE}"
        )
    bare = np.fromiter((framing is None for framing in framings), np.bool_, len(framings))[kind]
    place = np.where(bare, len(framings), np.where(nbytes < BLOCK, kind, -1))
    order = np.argsort(place, kind="stable")
    ends = run_ends(kind[order], nbytes[order]).tolist()
    kinds, sizes, pasts = (column[order].tolist() for column in (kind, nbytes, past_page))
    items, cutter, position = _ItemColumns(len(order)), _Cutter(start, max_window_bytes), start
    while (at := items.count) < len(order):
        size, past, framing, item = sizes[at], pasts[at], framings[kinds[at]], position
        if framing is None:
            first = -(-item // PAGE) * PAGE
            cutter.allow(first, item + size - first, PAGE)
            position = items.add(item, item, size, None)
            continue
        paged = size >= BLOCK or item - cutter.last_place >= max_window_bytes // 2
        frame = framing(item - past, paged)
        payload = item + len(frame.head)
        if past:  # The page before the first block also holds the head, which must not be cut.
            cutter.allow(payload - past + BLOCK, size - BLOCK, BLOCK)
        elif paged:
            cutter.allow(payload, max(size, 1), BLOCK)  # also at an empty payload
        position = items.add(item, payload, size, frame)
        if not paged and (position - item) % ALIGNMENT == 0:
            until_paged = cutter.last_place + max_window_bytes // 2 - position
            unpaged = -(-until_paged // (position - item))
            position = items.repeat(min(ends[at] - at - 1, max(0, unpaged)))
    return items.file_layout(order, cutter.finish(position))


def run_ends(*columns: I64) -> I64:
    """Return, for each row, the end of the run of rows that are equal in all columns."""
    count = len(columns[0])
    last = np.ones(count, dtype=np.bool_)
    last[:-1] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    ends = np.flatnonzero(last) + 1
    return np.repeat(ends, np.diff(ends, prepend=0))


class _ItemColumns:
    """Columns of a layout, in the order of the file, with space for `total` items."""

    def __init__(self, total: int) -> None:
        self._table = np.empty((4, total), dtype=np.int64)  # item, payload, length, frame
        self._frames: dict[int, tuple[int, Frame]] = {}
        self.count = 0
        """Number of items added so far."""

    def add(self, start: int, payload: int, size: int, frame: Frame | None) -> int:
        """Add an item and return the offset of its end."""
        end = payload + size + (frame.tail_length if frame else 0)
        number = -1 if frame is None else self._number(frame)
        self._table[:, self.count] = (start, payload, end - start, number)
        self.count += 1
        return end

    def repeat(self, count: int) -> int:
        """Add `count` copies of the last item, without gaps, and return the offset of their end."""
        last = self._table[:, self.count - 1 : self.count]
        length = int(last[2, 0])
        step = np.array([[length], [length], [0], [0]])
        more = last + step * np.arange(1, count + 1)
        self._table[:, self.count : self.count + count] = more
        self.count += count
        return int(last[0, 0]) + (count + 1) * length

    def file_layout(self, order: NDArray[np.intp], cuts: Sequence[int]) -> FileLayout:
        """Return the layout, with columns in the order of the rows."""
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
        # Frames of one kind usually are one object. Comparing their bytes would take longer.
        return self._frames.setdefault(id(frame), (len(self._frames), frame))[0]


class _Cutter:
    """Cuts a file into windows, each as large as the limit and the allowed places permit."""

    def __init__(self, start: int, max_window_bytes: int) -> None:
        self._max_window_bytes = max_window_bytes
        self._cuts = [start]
        self.last_place = start
        """The last place so far at which the file may be cut."""

    def allow(self, first: int, span: int, step: int) -> None:
        """Allow cuts at `first`, and then every `step` bytes up to, not including, `first + span`.

        Makes the cuts that the limit demands before these places end.
        """
        if first == self._cuts[0]:  # The file begins there anyway.
            first, span = first + step, span - step
        if span <= 0:
            return
        last = first + (span - 1) // step * step
        while last > (limit := self._cuts[-1] + self._max_window_bytes):
            here = first + (limit - first) // step * step if limit >= first else self.last_place
            self._cuts.append(here)
            self.last_place = here
        self.last_place = last

    def finish(self, end: int) -> list[int]:
        """Return all cuts of a file that ends at `end`."""
        if end - self._cuts[-1] > self._max_window_bytes:
            self._cuts.append(self.last_place)
        return [*self._cuts, end] if end > self._cuts[0] else self._cuts[:1]
