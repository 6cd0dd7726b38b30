"""Windows of a data file: made in memory from a layout and payloads, with checksums on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Condition
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardkeep.io.arena import memory_at
from shardkeep.io.checksums import crc32_blocks, crc32_each, whole_crc
from shardkeep.io.contract import Payloads
from shardkeep.io.scatter_gather import gather_bytes
from shardkeep.plan.file_layout import MIN_IN_PLACE_BYTES, FileLayout, lay_out, run_ends
from shardkeep.plan.packing import pack
from shardkeep.settings import ALIGNMENT, BLOCK, PAGE
from shardkeep.types import I64, Frame, Framing

__all__ = [
    "LIGHT_BYTES",
    "STEP_BYTES",
    "BlockChecksums",
    "FileWindows",
    "checksum_memory",
    "lay_out_files",
]

STEP_BYTES = 2 * BLOCK
"""Bytes that are copied and checksummed at a time: they fit into a core's own cache."""

LIGHT_BYTES = 16 * 1024
"""Largest payload whose item is made together with its neighbours."""

_FEW_ITEMS = 8
"""Up to this many items, a loop over them is as fast as making them together."""

BlockChecksums = Callable[[int, int, int, int], list[int]]
"""Returns the CRC-32 of each block of a range of a payload.

Arguments: row of the payload, first byte of the range, its length, and its address in memory.
"""


def checksum_memory(row: int, start: int, nbytes: int, address: int) -> list[int]:
    """Compute block checksums from the bytes in memory; a `BlockChecksums`."""
    return crc32_blocks(address, nbytes)


class _InPlaceRange(NamedTuple):
    """A range of the file whose bytes are written from the payload's own memory."""

    begin: int
    stop: int
    address: int


class FileWindows:
    """Makes the windows of one file of N items. Several threads can make windows at a time.

    Windows must be started in ascending order. The tail of an item holds the CRC-32 of its payload,
    so the window with the tail waits until the windows before it are made.

    Args:
        name: name of the file.
        layout: offsets of all items.
        payloads: the bytes of the payloads.
        rows: [N] rows of `payloads` that are in this file.
        nbytes: [N] bytes of each payload.
        crcs: row of `layout` -> known CRC-32, for payloads that get no block checksums here. They
            must have no frame.
        addresses: [N] memory addresses of payloads that are checksummed where they are. 0 for the
            others, whose windows may be cut at block boundaries only.
        in_place: write payloads with an address from their own memory, except for pages that they
            share with something else. Otherwise all bytes are copied.
        checksums: gives the block checksums of payloads above `LIGHT_BYTES`.
    """

    def __init__(
        self,
        name: str,
        layout: FileLayout,
        payloads: Payloads,
        rows: I64,
        nbytes: I64,
        crcs: Mapping[int, int],
        addresses: I64,
        *,
        in_place: bool,
        checksums: BlockChecksums = checksum_memory,
    ) -> None:
        self.name, self.layout, self.rows = name, layout, rows
        self._addresses, self._in_place = addresses.tolist(), in_place
        self._copy, self._blocks, self._memory = payloads.copy, checksums, payloads.addresses[rows]
        self._rows, self._nbytes = rows.tolist(), nbytes.tolist()
        self._items, self._starts = layout.item.tolist(), layout.payload.tolist()
        self._lengths, self._frames = layout.length.tolist(), layout.frame.tolist()
        self._cuts, self._order = layout.cuts.tolist(), layout.order.tolist()
        self._alike = run_ends(layout.frame[layout.order], nbytes[layout.order]).tolist()
        blocks = -(-nbytes // BLOCK)
        blocks[list(crcs)] = 0
        self.block: I64 = np.concatenate([np.zeros(1, np.int64), np.cumsum(blocks)])
        """[N + 1] rows block[i]:block[i + 1] of `checksums` belong to item i."""
        self._checksums = np.zeros(int(self.block[-1]), dtype=np.uint32)
        self._crcs = np.zeros(len(rows), dtype=np.uint32)
        self._crcs[list(crcs)] = list(crcs.values())
        self._first_block = self.block.tolist()
        starts = layout.item[layout.order]
        self._first = (np.searchsorted(starts, layout.cuts, side="right") - 1).tolist()
        self._last = np.searchsorted(starts, layout.cuts, side="left").tolist()
        self._made = [False] * self.count
        self._changed = Condition()
        self._error: BaseException | None = None

    @property
    def checksums(self) -> NDArray[np.uint32]:
        """CRC-32 of each block of the payloads; valid once its window is made."""
        return self._checksums

    @property
    def crc(self) -> NDArray[np.uint32]:
        """[N] CRC-32 of each payload; valid once its last window is made."""
        return self._crcs

    @property
    def count(self) -> int:
        """Number of windows."""
        return max(0, len(self._cuts) - 1)

    @property
    def max_bytes(self) -> int:
        """Bytes of memory that the largest window needs: whole pages."""
        return _page_up(int(np.diff(self.layout.cuts).max(initial=0))) + PAGE

    def span(self, number: int) -> tuple[int, int]:
        """Return the first byte of a window in the file, and its end."""
        return self._cuts[number], self._cuts[number + 1]

    def make(self, number: int, into: NDArray[np.uint8]) -> list[memoryview]:
        """Make a window, followed by zeros up to the next multiple of `PAGE`.

        Args:
            number: number of the window.
            into: memory for the bytes that are copied, at least `max_bytes`. Byte i of the window
                is copied to byte i of it.

        Returns:
            The parts of the window, in order: views of `into`, and of payloads in their own memory.
            If the window starts at a multiple of `PAGE`, so does each part, in the file and in
            memory, and its length is such a multiple.

        Raises:
            Exception: any error of the payloads. The caller must call `fail` then.
        """
        low, high = self.span(number)
        end = _page_up(high)
        into[high - low : end - low] = 0
        parts, done = [], low
        for begin, stop, address in self._make(low, high, number, into):
            parts += [into[done - low : begin - low].data] if begin > done else []
            parts.append(memory_at(address, stop - begin))
            done = stop
        parts += [into[done - low : end - low].data] if end > done else []
        with self._changed:
            self._made[number] = True
            self._changed.notify_all()
        return parts

    def fail(self, error: BaseException) -> None:
        """Record that a window will never be made; threads that wait for it raise `error`."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _make(
        self, low: int, high: int, number: int, into: NDArray[np.uint8]
    ) -> list[_InPlaceRange]:
        """Make a window in `into` and return the ranges that are written in place."""
        in_place: list[_InPlaceRange] = []
        view, base = into.data, into.ctypes.data - low  # the address that byte 0 would have
        at, last = self._first[number], self._last[number + 1]
        while at < last:
            row, end = self._order[at], at + 1
            light = self._frames[row] >= 0 and self._nbytes[row] <= LIGHT_BYTES
            # Windows are cut in payloads: only the first and the last item can be cut.
            if light and self._items[row] >= low:
                # No more than fits into a core's cache: temporary arrays take as much again.
                few = max(_FEW_ITEMS + 1, STEP_BYTES // self._lengths[row])
                end = min(self._alike[at], last, at + few)
                end -= end > at + 1 and self._end(self._order[end - 1]) > high
            if end - at > _FEW_ITEMS:
                self._make_together(self.layout.order[at:end], into[self._items[row] - low :])
            else:
                for each in self._order[at:end]:
                    in_place += self._make_item(each, low, high, number, view, base)
            at = end
        return in_place

    def _end(self, row: int) -> int:
        end: int = self._items[row] + self._lengths[row]
        return end

    def _make_together(self, rows: I64, into: NDArray[np.uint8]) -> None:
        """Make adjacent light items of one size and frame at the start of `into`.

        Only the CRC-32 takes a step of Python for each item.
        """
        first = int(rows[0])
        frame, size, length = self._frame(first), self._nbytes[first], self._lengths[first]
        items = into[: len(rows) * length].reshape(len(rows), length)
        items[:] = np.frombuffer(frame.head + bytes(size) + frame.tail(0), np.uint8)
        begin = len(frame.head)
        end = begin + size
        if size:  # Empty payloads have no address.
            self._gather(rows, items[:, begin:end])
        view = into.data
        starts = range(begin, begin + len(rows) * length, length)
        crcs = np.array(crc32_each([view[at : at + size] for at in starts]), dtype="<u4")
        places = end + len(frame.before), end + len(frame.before) + 4 + len(frame.between)
        for place in places:
            items[:, place : place + 4] = crcs.view(np.uint8).reshape(-1, 4)
        self._crcs[rows] = crcs
        if size:  # An empty payload has no block.
            self._checksums[self.block[rows]] = crcs

    def _gather(self, rows: I64, into: NDArray[np.uint8]) -> None:
        """Copy payloads of one size to `into` [N, size]: those with an address all at once."""
        addresses = self._memory[rows]
        gather_bytes(addresses, into)
        for at in np.flatnonzero(addresses == 0).tolist():
            self._copy(self._rows[rows[at]], 0, into.shape[1], into[at].ctypes.data)

    def _frame(self, row: int) -> Frame:
        number: int = self._frames[row]
        return self.layout.frames[number]

    def _make_item(
        self, row: int, low: int, high: int, number: int, view: memoryview, base: int
    ) -> list[_InPlaceRange]:
        """Make the part of one item that is in a window, and return the ranges left in place.

        `base` is the address that byte 0 of the file would have.
        """
        in_place: list[_InPlaceRange] = []
        item, start = self._items[row], self._starts[row]
        end = start + self._nbytes[row]
        begin, stop = max(start, low), min(end, high)
        frame = self._frame(row) if self._frames[row] >= 0 else None
        if frame is not None and item >= low:  # Cuts are inside payloads only: heads are whole.
            view[item - low : start - low] = frame.head
        if begin < stop and self._addresses[row]:
            in_place = self._make_from_memory(row, begin, stop, base)
        elif begin < stop and frame is None:
            self._copy(self._rows[row], begin - start, stop - begin, base + begin)
        elif begin < stop:
            self._copy_payload(row, begin, stop, base + begin)
        if frame is not None and low <= end < high:  # Tails are never cut either.
            tail = frame.tail(self._whole_crc(row, number))
            view[end - low : end - low + len(tail)] = tail
        elif frame is None and begin < stop == end and self._addresses[row]:
            self._whole_crc(row, number)
        return in_place

    def _make_from_memory(self, row: int, begin: int, stop: int, base: int) -> list[_InPlaceRange]:
        """Checksum part of a payload in its own memory, and copy what is not written in place."""
        start, inner, outer = self._starts[row], stop, stop
        if self._in_place:
            inner = min(_page_up(begin), stop)
            outer = max(inner, stop // PAGE * PAGE)
            self._checksum(row, inner - start, outer - start)
        for first, last in ((begin, inner), (outer, stop)):
            for low in range(first, last, STEP_BYTES):
                high = min(low + STEP_BYTES, last)
                self._copy(self._rows[row], low - start, high - low, base + low)
                self._checksum(row, low - start, high - start)
        here = self._addresses[row] - start
        return [_InPlaceRange(inner, outer, here + inner)] if inner < outer else []

    def _checksum(self, row: int, low: int, high: int) -> None:
        """Checksum the blocks that begin between bytes `low` and `high` of a payload.

        Reads whole blocks from the payload's memory, beyond `high` if need be: a window can be cut
        inside a block.
        """
        here, first = self._addresses[row], self._first_block[row]
        begin, end = -(-low // BLOCK), -(-high // BLOCK)
        start = begin * BLOCK
        nbytes = min(end * BLOCK, self._nbytes[row]) - start
        self._checksums[first + begin : first + end] = self._blocks(
            self._rows[row], start, nbytes, here + start
        )

    def _copy_payload(self, row: int, begin: int, stop: int, address: int) -> None:
        """Copy part of a payload, and checksum each step while it is in the cache."""
        source, start = self._rows[row], begin - self._starts[row]
        # A window may begin with a light payload, and `self._blocks` does not know those.
        checksums = checksum_memory if self._nbytes[row] <= LIGHT_BYTES else self._blocks
        for at in range(0, stop - begin, STEP_BYTES):
            nbytes = min(STEP_BYTES, stop - begin - at)
            self._copy(source, start + at, nbytes, address + at)
            found = checksums(source, start + at, nbytes, address + at)
            block = self._first_block[row] + (start + at) // BLOCK
            self._checksums[block : block + len(found)] = found

    def _whole_crc(self, row: int, number: int) -> int:
        """Return the CRC-32 of a payload whose last block is in this window."""
        first, last = self._first_block[row], self._first_block[row + 1]
        if last - first > 1:
            self._await_windows(self._starts[row], number)
        crc = whole_crc(self._checksums[first:last], self._nbytes[row])
        self._crcs[row] = crc
        return crc

    def _await_windows(self, start: int, number: int) -> None:
        """Wait for the windows before this one, back to the one that holds byte `start`."""
        with self._changed:
            while number and self._cuts[number] > start:
                number -= 1
                while not self._made[number]:
                    if self._error is not None:
                        raise self._error
                    self._changed.wait()


def lay_out_files(
    names: Sequence[str],
    nbytes: I64,
    kind: I64,
    framings: Sequence[Framing | None],
    payloads: Payloads,
    crcs: Mapping[int, int],
    max_window_bytes: int,
    *,
    in_place: bool,
    checksums: BlockChecksums = checksum_memory,
) -> list[FileWindows]:
    """Distribute payloads over files of about equal size, and lay each file out.

    A large payload starts as many bytes past a page in the file as in memory. The memory that it is
    loaded into later most likely has the same alignment.

    Args:
        names: names of the files.
        nbytes: [N] bytes of each payload.
        kind: [N] position in `framings` of the framing that makes each item's frame.
        framings: makes the frames of one kind; None for items without a frame.
        payloads: the bytes of the payloads.
        crcs: row -> CRC-32 of the payloads without a frame.
        max_window_bytes: size limit of a window.
        in_place: write large payloads from their own memory, which must not change until they are
            written. Otherwise all are copied when a window is made.
        checksums: gives the block checksums of payloads above `LIGHT_BYTES`.
    """
    place = _distribute(nbytes, kind, framings, len(names))
    framed = np.fromiter((framing is not None for framing in framings), np.bool_, len(framings))
    large = (nbytes >= MIN_IN_PLACE_BYTES) & framed[kind]
    addressed = large & (payloads.addresses % ALIGNMENT == 0)
    addresses = np.where(addressed, payloads.addresses, 0)
    files = []
    for file, name in enumerate(names):
        rows = np.flatnonzero(place == file)
        its_bytes, its_addresses = nbytes[rows], addresses[rows]
        past_page = its_addresses % PAGE
        files.append(
            FileWindows(
                name,
                lay_out(its_bytes, kind[rows], framings, past_page, max_window_bytes),
                payloads,
                rows,
                its_bytes,
                {at: crcs[row] for at, row in enumerate(rows.tolist()) if row in crcs},
                its_addresses,
                in_place=in_place,
                checksums=checksums,
            )
        )
    return files


def _distribute(nbytes: I64, kind: I64, framings: Sequence[Framing | None], files: int) -> I64:
    """Return the file of each payload.

    Frames count, too: those of small payloads are larger than the payloads.
    """
    if files < 2:
        return np.zeros(len(nbytes), dtype=np.int64)
    frames = [0 if framing is None else _frame_bytes(framing) for framing in framings]
    return pack(nbytes + np.array(frames, dtype=np.int64)[kind], files)


def _frame_bytes(framing: Framing) -> int:
    frame = framing(0, False)
    return len(frame.head) + frame.tail_length


def _page_up(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE
