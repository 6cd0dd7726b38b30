"""A data file as it will be: any window of it can be made in memory, digests on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Condition
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardkeep.contracts import Payloads
from shardkeep.io.arena import memory_at
from shardkeep.io.digest import crc32_blocks, crc32_each, whole_crc
from shardkeep.io.scattered import pick_up
from shardkeep.io.write import Written, take_blocks
from shardkeep.knobs import ALIGNMENT, BLOCK, PAGE
from shardkeep.plan.layout import Layout, lay_out, least_in_place
from shardkeep.plan.packing import pack
from shardkeep.types import I64, Framing

__all__ = ["LIGHT", "STEP", "Digests", "Image", "images_of", "of_memory", "written_in"]

STEP = 2 * BLOCK
"""Bytes that are copied at once: as large as a core's own cache may be."""

LIGHT = 16 * 1024
"""Bytes of a payload up to which an item is put together with its neighbours."""

Digests = Callable[[int, int, int, int], list[int]]
"""CRC-32 of each block of some bytes of a payload: its row, the first of the bytes, how many, and
the address where they lie in memory."""


def of_memory(row: int, start: int, nbytes: int, address: int) -> list[int]:
    """`Digests` that are taken when they are asked for."""
    return crc32_blocks(address, nbytes)


class _InPlace(NamedTuple):
    """Part of a payload that is written from where it lies: bytes of the file, and an address."""

    begin: int
    stop: int
    address: int


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
        addresses: [N] where a payload lies in memory, as far past a page as in the file; 0 for
            those of which nothing is known but their bytes.
        in_place: leave payloads where they lie, but for what shares a page with something else;
            else all are copied.
        digests: gives those of payloads of more than `LIGHT` bytes.
    """

    def __init__(
        self,
        name: str,
        layout: Layout,
        payloads: Payloads,
        rows: I64,
        nbytes: I64,
        crcs: Mapping[int, int],
        addresses: I64,
        *,
        in_place: bool,
        digests: Digests,
    ) -> None:
        self.name, self.layout, self.rows = name, layout, rows
        self._addresses, self._in_place = addresses.tolist(), in_place
        self._copy, self._address_of, self._blocks = payloads.copy, payloads.address, digests
        self._rows, self._nbytes = rows.tolist(), nbytes.tolist()
        self._items, self._starts = layout.item.tolist(), layout.payload.tolist()
        self._lengths = layout.length.tolist()
        bare = np.fromiter((frame is None for frame in layout.frames), np.bool_, len(rows))
        self._light = (~bare & (nbytes <= LIGHT)).tolist()
        self._cuts, self._order = layout.cuts.tolist(), layout.order.tolist()
        blocks = -(-nbytes // BLOCK)
        blocks[list(crcs)] = 0
        self.block: I64 = np.concatenate([np.zeros(1, np.int64), np.cumsum(blocks)])
        """[N + 1] rows block[i]:block[i + 1] of `digests` belong to item i: none of a bare one."""
        self._digests = np.zeros(int(self.block[-1]), dtype=np.uint32)
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
    def digests(self) -> NDArray[np.uint32]:
        """CRC-32 of each block of `BLOCK` bytes of a payload; true once its window is made."""
        return self._digests

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
        for begin, stop, address in self._make(
            low, high, number, into.data, into.ctypes.data - low
        ):
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

    def _make(
        self, low: int, high: int, number: int, view: memoryview, base: int
    ) -> list[_InPlace]:
        """`base` is where byte 0 of the file would be in memory.

        Returns:
            What is not in `view`.
        """
        items, light, in_place = self._items, self._light, []
        rows = self._order[self._first[number] : self._last[number + 1]]
        at = 0
        while at < len(rows):
            end = at
            while end < len(rows) and light[rows[end]]:
                end += 1
            # Windows are cut in payloads: only the first and the last item may be cut.
            begin = at + (at < end and items[rows[at]] < low)
            end -= end > begin and self._end(rows[end - 1]) > high
            if begin == at < end:
                first, last = rows[at], rows[end - 1]
                view[items[first] - low : self._end(last) - low] = self._together(rows[at:end])
                at = end
            else:
                in_place += self._alone(rows[at], low, high, number, view, base)
                at += 1
        return in_place

    def _end(self, row: int) -> int:
        end: int = self._items[row] + self._lengths[row]
        return end

    def _together(self, rows: Sequence[int]) -> bytes:
        """The bytes of light items that follow each other: few steps of Python for each."""
        taken = self._taken(rows)
        crcs = np.array(crc32_each(taken), dtype="<u4")
        self._crcs[rows] = crcs
        block = self.block[rows]
        some = self.block[np.add(rows, 1)] > block  # an empty payload has no block
        self._digests[block[some]] = crcs[some]
        packed, parts = crcs.tobytes(), list[bytes]()
        for at, (row, data) in enumerate(zip(rows, taken, strict=True)):
            frame, crc = self.layout.frames[row], packed[4 * at : 4 * at + 4]
            assert frame is not None
            parts += (frame.head, data, frame.before, crc, frame.between, crc, frame.after)
        return b"".join(parts)

    def _taken(self, rows: Sequence[int]) -> list[bytes]:
        """Copies of the payloads of light items."""
        sources, nbytes = [self._rows[row] for row in rows], [self._nbytes[row] for row in rows]
        addresses = np.array(list(map(self._address_of, sources)), dtype=np.int64)
        sizes = np.array(nbytes, dtype=np.int64)
        taken = pick_up(addresses, np.where(addresses, sizes, 0))
        for at in np.flatnonzero((addresses == 0) & (sizes > 0)).tolist():
            copy = np.empty(nbytes[at], dtype=np.uint8)
            self._copy(sources[at], 0, nbytes[at], copy.ctypes.data)
            taken[at] = copy.tobytes()
        return taken

    def _alone(
        self, row: int, low: int, high: int, number: int, view: memoryview, base: int
    ) -> list[_InPlace]:
        """What a window has of one item; returns as `_make`."""
        in_place: list[_InPlace] = []
        item, start, frame = self._items[row], self._starts[row], self.layout.frames[row]
        end = start + self._nbytes[row]
        begin, stop = max(start, low), min(end, high)
        if frame is None:
            if begin < stop:
                self._copy(self._rows[row], begin - start, stop - begin, base + begin)
            return in_place
        if item >= low:  # cuts lie inside of payloads only: a head is whole
            view[item - low : start - low] = frame.head
        if begin < stop and self._addresses[row]:
            in_place = self._from_memory(row, begin, stop, base)
        elif begin < stop:
            self._payload(row, begin, stop, base + begin)
        if end <= high and (start >= low or begin < stop):
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
            self._digest(row, inner - start, outer - start)
        for first, last in ((begin, inner), (outer, stop)):
            for low in range(first, last, STEP):
                high = min(low + STEP, last)
                self._copy(self._rows[row], low - start, high - low, base + low)
                self._digest(row, low - start, high - start)
        here = self._addresses[row] - start
        return [_InPlace(inner, outer, here + inner)] if inner < outer else []

    def _digest(self, row: int, low: int, high: int) -> None:
        """Digest the blocks of a payload that begin between these bytes of it, where they lie.

        A window is cut up to a page before a block begins, so some of the block is in the next.
        """
        here, first = self._addresses[row], self._first_block[row]
        begin, end = -(-low // BLOCK), -(-high // BLOCK)
        start = begin * BLOCK
        nbytes = min(end * BLOCK, self._nbytes[row]) - start
        self._digests[first + begin : first + end] = self._blocks(
            self._rows[row], start, nbytes, here + start
        )

    def _payload(self, row: int, begin: int, stop: int, address: int) -> None:
        """Copy part of a payload, in steps that are in the cache for their digests."""
        source, start = self._rows[row], begin - self._starts[row]
        # Nobody else digests light ones, and a window may begin with one.
        digests = of_memory if self._light[row] else self._blocks
        for at in range(0, stop - begin, STEP):
            nbytes = min(STEP, stop - begin - at)
            self._copy(source, start + at, nbytes, address + at)
            found = digests(source, start + at, nbytes, address + at)
            block = self._first_block[row] + (start + at) // BLOCK
            self._digests[block : block + len(found)] = found

    def _whole(self, row: int, number: int) -> int:
        """The CRC-32 of a payload whose last block is in this window."""
        first, last = self._first_block[row], self._first_block[row + 1]
        if last - first > 1:
            self._await(self._starts[row], number)
        crc = whole_crc(self._digests[first:last], self._nbytes[row])
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


def images_of(
    names: Sequence[str],
    nbytes: I64,
    framings: Sequence[Framing | None],
    payloads: Payloads,
    crcs: Mapping[int, int],
    window: int,
    *,
    in_place: bool,
    digests: Digests = of_memory,
) -> list[Image]:
    """Images of files that are even in bytes.

    Args:
        names: of the files.
        nbytes: [N] bytes of each payload.
        framings: [N] what makes its frame; None where it is an item as it is.
        payloads: gives the bytes.
        crcs: row -> CRC-32 of those that have no frame.
        window: bytes of a window at most.
        in_place: write large payloads from where they lie, so that they must not change until they
            are written; else all are copied when a window is made. Either way they lie in the
            file as in memory, past a page: so will the memory that they are read to, most likely.
        digests: as of `Image`.
    """
    place = _shared_out(nbytes, framings, len(names))
    addresses = np.zeros(len(nbytes), dtype=np.int64)
    for row in np.flatnonzero(nbytes >= least_in_place).tolist():
        address = payloads.address(row)
        if framings[row] is not None and not address % ALIGNMENT:
            addresses[row] = address
    images = []
    for file, name in enumerate(names):
        rows = np.flatnonzero(place == file)
        here = rows.tolist()
        its_crcs = {at: crcs[row] for at, row in enumerate(here) if row in crcs}
        its_framings = [framings[row] for row in here]
        layout = lay_out(nbytes[rows], its_framings, addresses[rows] % PAGE, window)
        its_bytes, its_addresses = nbytes[rows], addresses[rows]
        images.append(
            Image(
                name,
                layout,
                payloads,
                rows,
                its_bytes,
                its_crcs,
                its_addresses,
                in_place=in_place,
                digests=digests,
            )
        )
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
