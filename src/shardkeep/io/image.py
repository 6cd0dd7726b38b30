"""A data file as it will be: any window of it can be made in memory, digests on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Condition
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.contracts import Payloads
from shardkeep.io.digest import crc32, whole_crc
from shardkeep.io.write import Written, take_blocks
from shardkeep.knobs import BLOCK, PAGE
from shardkeep.plan.layout import Layout, lay_out
from shardkeep.plan.packing import pack
from shardkeep.types import I64, Framing

__all__ = ["Image", "images_of", "written_in"]


class Image:
    """One file of N items, which lie as a `Layout` says. Windows are made by several threads.

    Windows must be begun in ascending order: the tail of an item holds the CRC-32 of its payload,
    so the window that has it waits until those before it are made.

    Args:
        name: of the file.
        layout: where everything lies.
        payloads: gives their bytes.
        rows: [N] the rows of `payloads` that are in this file.
        nbytes: [N] bytes of each payload.
        crcs: CRC-32 of the payloads of bare items, by row of `layout`; the rows of all others are
            digested here.
    """

    def __init__(
        self,
        name: str,
        layout: Layout,
        payloads: Payloads,
        rows: I64,
        nbytes: I64,
        crcs: Mapping[int, int],
    ) -> None:
        self.name, self.layout, self.rows = name, layout, rows
        self._copy = payloads.copy
        self._rows, self._nbytes = rows.tolist(), nbytes.tolist()
        self._items, self._starts = layout.item.tolist(), layout.payload.tolist()
        self._cuts, self._order = layout.cuts.tolist(), layout.order.tolist()
        blocks = -(-nbytes // BLOCK)
        blocks[list(crcs)] = 0
        self.block: I64 = np.concatenate([np.zeros(1, np.int64), np.cumsum(blocks)])
        """[N + 1] rows block[i]:block[i + 1] of `digests` belong to item i: none of a bare one."""
        self.digests: NDArray[np.uint32] = np.zeros(int(self.block[-1]), dtype=np.uint32)
        """CRC-32 of each block of `BLOCK` bytes of a payload; true once its window is made."""
        self.crc: NDArray[np.uint32] = np.zeros(len(rows), dtype=np.uint32)
        """[N] CRC-32 of each payload."""
        self.crc[list(crcs)] = list(crcs.values())
        self._first_block = self.block.tolist()
        starts = layout.item[layout.order]
        self._first = (np.searchsorted(starts, layout.cuts, side="right") - 1).tolist()
        self._last = np.searchsorted(starts, layout.cuts, side="left").tolist()
        self._made = [False] * self.windows
        self._changed = Condition()
        self._error: BaseException | None = None

    @property
    def windows(self) -> int:
        """How many windows the file is cut into."""
        return max(0, len(self._cuts) - 1)

    def span(self, number: int) -> tuple[int, int]:
        """The bytes of the file that a window has."""
        return self._cuts[number], self._cuts[number + 1]

    def make(self, number: int, into: NDArray[np.uint8]) -> None:
        """Fill the start of `into` with a window, and zeros up to the next multiple of `PAGE`.

        Raises: whatever the payloads raise. Who made it must then call `fail`.
        """
        low, high = self.span(number)
        into[high - low : -(-(high - low) // PAGE) * PAGE] = 0
        self._make(low, high, number, into.data, into.ctypes.data - low)
        with self._changed:
            self._made[number] = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Some window will never be made: who waits for it raises this."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _make(self, low: int, high: int, number: int, view: memoryview, base: int) -> None:
        """`base` is where byte 0 of the file would be in memory."""
        items, starts, frames = self._items, self._starts, self.layout.frames
        copy, rows = self._copy, self._rows
        for row in self._order[self._first[number] : self._last[number + 1]]:
            start, frame = starts[row], frames[row]
            end = start + self._nbytes[row]
            if frame is None:
                begin, stop = max(start, low), min(end, high)
                if begin < stop:
                    copy(rows[row], begin - start, stop - begin, base + begin)
                continue
            if items[row] >= low:  # cuts lie inside of payloads only: a head is whole
                view[items[row] - low : start - low] = frame.head
            begin = start if start > low else low
            stop = end if end < high else high
            if begin < stop:
                self._payload(row, begin, stop, view[begin - low : stop - low], base + begin)
            if end <= high and (start >= low or begin < stop):
                tail = frame.tail(self._whole(row, number))
                view[end - low : end - low + len(tail)] = tail

    def _payload(self, row: int, begin: int, stop: int, view: memoryview, address: int) -> None:
        """Copy part of a payload, by blocks that are in the cache for their digests."""
        copy, source, start = self._copy, self._rows[row], begin - self._starts[row]
        block = self._first_block[row] + start // BLOCK
        if len(view) <= BLOCK:
            copy(source, start, len(view), address)
            self.digests[block] = crc32(view)
            return
        for at in range(0, len(view), BLOCK):
            part = view[at : at + BLOCK]
            copy(source, start + at, len(part), address + at)
            self.digests[block] = crc32(part)
            block += 1

    def _whole(self, row: int, number: int) -> int:
        """The CRC-32 of a payload whose last block is in this window."""
        first, last = self._first_block[row], self._first_block[row + 1]
        if last - first > 1:
            self._await(self._starts[row], number)
        crc = int(self.digests[first]) if last - first == 1 else self._combined(row, first, last)
        self.crc[row] = crc
        return crc

    def _combined(self, row: int, first: int, last: int) -> int:
        return whole_crc(self.digests[first:last], self._nbytes[row])

    def _await(self, start: int, number: int) -> None:
        """Wait for the windows before this one, back to where byte `start` is."""
        with self._changed:
            while number and self._cuts[number] > start:
                number -= 1
                while not self._made[number]:
                    if self._error is not None:
                        raise self._error
                    self._changed.wait()

    def forget(self) -> None:
        """Let go of the payloads: all windows are made."""
        self._copy = _gone


def _gone(row: int, start: int, nbytes: int, address: int) -> None:
    raise RuntimeError("an image was made for good, and is asked to make a window")


def images_of(
    names: Sequence[str],
    nbytes: I64,
    framings: Sequence[Framing | None],
    payloads: Payloads,
    crcs: Mapping[int, int],
    window: int,
) -> list[Image]:
    """Images of files that are even in bytes.

    Args:
        names: of the files.
        nbytes: [N] bytes of each payload.
        framings: [N] what makes its frame; None where it is an item as it is.
        payloads: gives the bytes.
        crcs: row -> CRC-32 of those that have no frame.
        window: bytes of a window at most.
    """
    place = _shared_out(nbytes, framings, len(names))
    images = []
    for file, name in enumerate(names):
        rows = np.flatnonzero(place == file)
        here = rows.tolist()
        its_crcs = {at: crcs[row] for at, row in enumerate(here) if row in crcs}
        layout = lay_out(nbytes[rows], [framings[row] for row in here], window)
        images.append(Image(name, layout, payloads, rows, nbytes[rows], its_crcs))
    return images


def _shared_out(nbytes: I64, framings: Sequence[Framing | None], files: int) -> I64:
    """The file of each payload: even in bytes, with what lies around them, as small ones have more
    of that than of their own.
    """
    if files < 2:
        return np.zeros(len(nbytes), dtype=np.int64)
    around = [0 if framing is None else _around(framing) for framing in framings]
    return pack(nbytes + np.array(around, dtype=np.int64), files)


def _around(framing: Framing) -> int:
    frame = framing(0, False)
    return len(frame.head) + frame.tail_length


def written_in(images: Sequence[Image]) -> Written:
    """Where everything went, in the order of the payloads."""
    counts = [len(image.rows) for image in images]
    order = np.argsort(_joined([image.rows for image in images], np.int64))
    blocks = _joined([np.diff(image.block) for image in images], np.int64)
    digests = _joined([image.digests for image in images], np.uint32)
    block, taken = take_blocks(blocks, digests, order)
    return Written(
        files=tuple(image.name for image in images),
        file=np.repeat(np.arange(len(images), dtype=np.int32), counts)[order],
        item=_joined([image.layout.item for image in images], np.int64)[order],
        length=_joined([image.layout.length for image in images], np.int64)[order],
        payload=_joined([image.layout.payload for image in images], np.int64)[order],
        block=block,
        digests=taken,
        crc=_joined([image.crc for image in images], np.uint32)[order],
    )


def _joined(parts: Sequence[NDArray[Any]], dtype: type[Any]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *parts])
