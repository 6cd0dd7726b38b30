"""A data file as it will be: any window of it can be made in memory, checksums on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Condition
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardkeep.io.arena import memory_at
from shardkeep.io.checksums import crc32_blocks, crc32_each, whole_crc
from shardkeep.io.contract import Payloads
from shardkeep.io.scatter_gather import pick_up
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
"""Bytes that are copied at once: as large as a core's own cache may be."""

LIGHT_BYTES = 16 * 1024
"""Bytes of a payload up to which an item is made together with its neighbours."""

_FEW = 8
"""Items up to which one after the other is as quick as all of them together."""

BlockChecksums = Callable[[int, int, int, int], list[int]]
"""CRC-32 of each block of some bytes of a payload: its row, the first of the bytes, how many, and
the address where they lie in memory."""


def checksum_memory(row: int, start: int, nbytes: int, address: int) -> list[int]:
    """`BlockChecksums` that are taken when they are asked for."""
    return crc32_blocks(address, nbytes)


class _InPlace(NamedTuple):
    """Part of a payload that is written from where it lies: bytes of the file, and an address."""

    begin: int
    stop: int
    address: int


class FileWindows:
    """One file of N items, which lie as a `FileLayout` says. Windows are made by several threads.

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
        addresses: [N] where a payload lies in memory, as far past a page as in the file; 0 for
            those of which nothing is known but their bytes.
        in_place: leave payloads where they lie, but for what shares a page with something else;
            else all are copied.
        checksums: gives those of payloads of more than `LIGHT_BYTES` bytes.
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
        checksums: BlockChecksums,
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
        """[N + 1] rows block[i]:block[i + 1] of `checksums` belong to item i: none if bare."""
        self._checksums = np.zeros(int(self.block[-1]), dtype=np.uint32)
        self._crcs = np.zeros(len(rows), dtype=np.uint32)
        self._crcs[list(crcs)] = list(crcs.values())
        self._first_block = self.block.tolist()
        starts = layout.item[layout.order]
        self._first = (np.searchsorted(starts, layout.cuts, side="right") - 1).tolist()
        self._last = np.searchsorted(starts, layout.cuts, side="left").tolist()
        self._made = [False] * self.windows
        self._changed = Condition()
        self._error: BaseException | None = None

    @property
    def checksums(self) -> NDArray[np.uint32]:
        """CRC-32 of each block of `BLOCK` bytes of a payload; true once its window is made."""
        return self._checksums

    @property
    def crc(self) -> NDArray[np.uint32]:
        """[N] CRC-32 of each payload; true once its last window is made."""
        return self._crcs

    @property
    def windows(self) -> int:
        """How many windows the file is cut into."""
        return max(0, len(self._cuts) - 1)

    def span(self, number: int) -> tuple[int, int]:
        """The bytes of the file that a window has."""
        return self._cuts[number], self._cuts[number + 1]

    def make(self, number: int, into: NDArray[np.uint8]) -> list[memoryview]:
        """Make a window, and zeros up to the next multiple of `PAGE`.

        Args:
            number: of the window.
            into: what is copied goes into its start, each byte to its place in the window.

        Returns:
            The window, in parts: of `into`, and of payloads where they lie. Each starts at a
            multiple of `PAGE` in memory, and has such a length.

        Raises: whatever the payloads raise. Who made it must then call `fail`.
        """
        low, high = self.span(number)
        end = -(-high // PAGE) * PAGE
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
        """Some window will never be made: who waits for it raises this."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _make(self, low: int, high: int, number: int, into: NDArray[np.uint8]) -> list[_InPlace]:
        """Make a window in `into`; returns what of it is left where it lies."""
        in_place: list[_InPlace] = []
        view, base = into.data, into.ctypes.data - low  # where byte 0 of the file would be
        at, last = self._first[number], self._last[number + 1]
        while at < last:
            row, end = self._order[at], at + 1
            light = self._frames[row] >= 0 and self._nbytes[row] <= LIGHT_BYTES
            # Windows are cut in payloads: only the first and the last item may be cut.
            if light and self._items[row] >= low:
                # No more than stays in a core's cache: what is made on the way takes as much again.
                few = max(_FEW + 1, STEP_BYTES // self._lengths[row])
                end = min(self._alike[at], last, at + few)
                end -= end > at + 1 and self._end(self._order[end - 1]) > high
            if end - at > _FEW:
                self._together(self.layout.order[at:end], into[self._items[row] - low :])
            else:
                for one in self._order[at:end]:
                    in_place += self._alone(one, low, high, number, view, base)
            at = end
        return in_place

    def _end(self, row: int) -> int:
        end: int = self._items[row] + self._lengths[row]
        return end

    def _together(self, rows: I64, into: NDArray[np.uint8]) -> None:
        """Make light items that follow each other, alike in size and frame, at the start of `into`:
        no step of Python for each, but for its CRC-32.
        """
        first = int(rows[0])
        frame, size, length = self._frame(first), self._nbytes[first], self._lengths[first]
        items = into[: len(rows) * length].reshape(len(rows), length)
        items[:] = np.frombuffer(frame.head + bytes(size) + frame.tail(0), np.uint8)
        begin = len(frame.head)
        end = begin + size
        if size:  # empty ones lie nowhere
            self._pick_up(rows, items[:, begin:end])
        view = into.data
        starts = range(begin, begin + len(rows) * length, length)
        crcs = np.array(crc32_each([view[at : at + size] for at in starts]), dtype="<u4")
        places = end + len(frame.before), end + len(frame.before) + 4 + len(frame.between)
        for place in places:
            items[:, place : place + 4] = crcs.view(np.uint8).reshape(-1, 4)
        self._crcs[rows] = crcs
        if size:  # an empty payload has no block
            self._checksums[self.block[rows]] = crcs

    def _pick_up(self, rows: I64, into: NDArray[np.uint8]) -> None:
        """Copy payloads of one size, [N, size], those that lie in memory all at once."""
        addresses = self._memory[rows]
        pick_up(addresses, into)
        for at in np.flatnonzero(addresses == 0).tolist():
            self._copy(self._rows[rows[at]], 0, into.shape[1], into[at].ctypes.data)

    def _frame(self, row: int) -> Frame:
        number: int = self._frames[row]
        return self.layout.frames[number]

    def _alone(
        self, row: int, low: int, high: int, number: int, view: memoryview, base: int
    ) -> list[_InPlace]:
        """What a window has of one item; `base` is where byte 0 of the file would be in memory.

        Returns as `_make`.
        """
        in_place: list[_InPlace] = []
        item, start = self._items[row], self._starts[row]
        end = start + self._nbytes[row]
        begin, stop = max(start, low), min(end, high)
        if self._frames[row] < 0:
            if begin < stop:
                self._copy(self._rows[row], begin - start, stop - begin, base + begin)
            return in_place
        frame = self._frame(row)
        if item >= low:  # cuts lie inside of payloads only: a head is whole
            view[item - low : start - low] = frame.head
        if begin < stop and self._addresses[row]:
            in_place = self._from_memory(row, begin, stop, base)
        elif begin < stop:
            self._payload(row, begin, stop, base + begin)
        if low <= end < high:  # never cut either
            tail = frame.tail(self._whole(row, number))
            view[end - low : end - low + len(tail)] = tail
        return in_place

    def _from_memory(self, row: int, begin: int, stop: int, base: int) -> list[_InPlace]:
        """Digest part of a payload where it lies, and copy it, or only what shares a page with
        something else; returns as `_make`.
        """
        start, inner, outer = self._starts[row], stop, stop
        if self._in_place:
            inner = min(-(-begin // PAGE) * PAGE, stop)
            outer = max(inner, stop // PAGE * PAGE)
            self._checksum(row, inner - start, outer - start)
        for first, last in ((begin, inner), (outer, stop)):
            for low in range(first, last, STEP_BYTES):
                high = min(low + STEP_BYTES, last)
                self._copy(self._rows[row], low - start, high - low, base + low)
                self._checksum(row, low - start, high - start)
        here = self._addresses[row] - start
        return [_InPlace(inner, outer, here + inner)] if inner < outer else []

    def _checksum(self, row: int, low: int, high: int) -> None:
        """Digest the blocks of a payload that begin between these bytes of it, where they lie.

        A window is cut up to a page before a block begins, so some of the block is in the next.
        """
        here, first = self._addresses[row], self._first_block[row]
        begin, end = -(-low // BLOCK), -(-high // BLOCK)
        start = begin * BLOCK
        nbytes = min(end * BLOCK, self._nbytes[row]) - start
        self._checksums[first + begin : first + end] = self._blocks(
            self._rows[row], start, nbytes, here + start
        )

    def _payload(self, row: int, begin: int, stop: int, address: int) -> None:
        """Copy part of a payload, in steps that are in the cache for their digests."""
        source, start = self._rows[row], begin - self._starts[row]
        # Nobody else checksums light ones, and a window may begin with one.
        checksums = checksum_memory if self._nbytes[row] <= LIGHT_BYTES else self._blocks
        for at in range(0, stop - begin, STEP_BYTES):
            nbytes = min(STEP_BYTES, stop - begin - at)
            self._copy(source, start + at, nbytes, address + at)
            found = checksums(source, start + at, nbytes, address + at)
            block = self._first_block[row] + (start + at) // BLOCK
            self._checksums[block : block + len(found)] = found

    def _whole(self, row: int, number: int) -> int:
        """The CRC-32 of a payload whose last block is in this window."""
        first, last = self._first_block[row], self._first_block[row + 1]
        if last - first > 1:
            self._await(self._starts[row], number)
        crc = whole_crc(self._checksums[first:last], self._nbytes[row])
        self._crcs[row] = crc
        return crc

    def _await(self, start: int, number: int) -> None:
        """Wait for the windows before this one, back to where byte `start` is."""
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
    window: int,
    *,
    in_place: bool,
    checksums: BlockChecksums = checksum_memory,
) -> list[FileWindows]:
    """Images of files that are even in bytes.

    Args:
        names: of the files.
        nbytes: [N] bytes of each payload.
        kind: [N] which of `framings` makes its frame.
        framings: None where a payload is an item as it is.
        payloads: gives the bytes.
        crcs: row -> CRC-32 of those that have no frame.
        window: bytes of a window at most.
        in_place: write large payloads from where they lie, so that they must not change until they
            are written; else all are copied when a window is made. Either way they lie in the
            file as in memory, past a page: so will the memory that they are read to, most likely.
        checksums: as of `FileWindows`.
    """
    place = _shared_out(nbytes, kind, framings, len(names))
    framed = np.fromiter((framing is not None for framing in framings), np.bool_, len(framings))
    large = (nbytes >= MIN_IN_PLACE_BYTES) & framed[kind]
    lies = large & (payloads.addresses % ALIGNMENT == 0)
    addresses = np.where(lies, payloads.addresses, 0)
    images = []
    for file, name in enumerate(names):
        rows = np.flatnonzero(place == file)
        its_bytes, its_addresses = nbytes[rows], addresses[rows]
        images.append(
            FileWindows(
                name,
                lay_out(its_bytes, kind[rows], framings, its_addresses % PAGE, window),
                payloads,
                rows,
                its_bytes,
                {at: crcs[row] for at, row in enumerate(rows.tolist()) if row in crcs},
                its_addresses,
                in_place=in_place,
                checksums=checksums,
            )
        )
    return images


def _shared_out(nbytes: I64, kind: I64, framings: Sequence[Framing | None], files: int) -> I64:
    """The file of each payload: even in bytes, with what lies around them, as small ones have more
    of that than of their own.
    """
    if files < 2:
        return np.zeros(len(nbytes), dtype=np.int64)
    around = [0 if framing is None else _around(framing) for framing in framings]
    return pack(nbytes + np.array(around, dtype=np.int64)[kind], files)


def _around(framing: Framing) -> int:
    frame = framing(0, False)
    return len(frame.head) + frame.tail_length
