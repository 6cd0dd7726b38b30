"""Checks all bytes of a checkpoint that have a checksum, and lists what has none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from shardkeep import settings
from shardkeep.checkpoint.chunk_locations import (
    ChunkLocations,
    inside,
    read_range,
    unpacked_limit,
    window,
)
from shardkeep.checkpoint.commit import METADATA, Found
from shardkeep.errors import Damaged, FormatError
from shardkeep.format.dcp import transforms
from shardkeep.format.torch_zip import container
from shardkeep.format.torch_zip.container_write import TensorFraming
from shardkeep.io.checksums import crc32, whole_crc
from shardkeep.io.read.check import StoredPayload, verify_payloads
from shardkeep.settings import PAGE
from shardkeep.types import DTYPES, ByteRange, Progress
from shardkeep.util.escaping import escape, one_line
from shardkeep.util.formatting import count, human_bytes

__all__ = ["VerifyReport", "verify"]


@dataclass(frozen=True, slots=True, repr=False)
class VerifyReport:
    """The result of checking all bytes of a checkpoint. Printing it lists all damage.

    Attributes:
        path: the checkpoint's path or URL.
        kind: what wrote it, as in `Checkpoint.kind`; "unknown" if its metadata are unreadable.
        files: number of files that its metadata name.
        checked_bytes: number of bytes that were compared with a checksum.
        damaged: the damage: file, tensor, rank and block of each. An object is one block with one
            checksum, so no block is named.
        unchecked: names of tensors, objects and files that have no checksum. They may be damaged.
        unchecked_bytes: number of bytes of those.

    Example:
        >>> import shardkeep as sk
        >>> report = sk.open("run/step_100").verify()  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
        run/step_100: whole; 430.2 KiB of 1 file checked
        >>> report.ok  # doctest: +SKIP
        True
    """

    path: str
    kind: str
    files: int
    checked_bytes: int
    damaged: tuple[Damaged, ...]
    unchecked: tuple[str, ...]
    unchecked_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing that was checked is damaged."""
        return not self.damaged

    @property
    def verdict(self) -> str:
        """The result in a few words: "whole", "damaged in 2 places", or that it is not known."""
        if self.damaged:
            return f"damaged in {count(len(self.damaged), 'place')}"
        if self.checked_bytes:
            return "whole"
        return "no damage found, but nothing could be checked"

    @property
    def extent(self) -> str:
        """How much was checked, such as "430.2 KiB of 1 file checked"."""
        return f"{human_bytes(self.checked_bytes)} of {count(self.files, 'file')} checked"

    def details(self) -> Iterator[str]:
        """Return a line for each place that is damaged and each name that was not checked.

        Example:
            >>> list(VerifyReport("run", "dcp", 1, 10, (), (".metadata",), 10).details())
            ['1 name has no checksum, so damage there is not detected:', '  .metadata']
        """
        for damage in self.damaged:
            yield f"  {_place(damage)}: {one_line(damage.what)}"
        if self.unchecked:
            have = "name has" if len(self.unchecked) == 1 else "names have"
            many = f"{len(self.unchecked):,} {have} no checksum"
            yield f"{many}, so damage there is not detected:"
            yield from (f"  {escape(name)}" for name in self.unchecked)

    def __str__(self) -> str:
        return "\n".join([f"{one_line(self.path)}: {self.verdict}; {self.extent}", *self.details()])

    def __repr__(self) -> str:
        return f"<VerifyReport {one_line(self.path)}: {self.verdict}; {self.extent}>"


def _place(damage: Damaged) -> str:
    """Return where damage is: file, tensor, block, and the rank that wrote it."""
    name = f", {escape(damage.name)}" if damage.name is not None else ""
    block = f", block {damage.block}" if damage.block is not None else ""
    writer = f" (written by rank {damage.rank})" if damage.rank is not None else ""
    return escape(damage.file) + name + block + writer


def verify(
    found: Found,
    sources: ChunkLocations,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Return a report on all payloads, objects, headers and metadata.

    Damage is collected, not raised. Files are read in parallel and in bounded memory. What
    Shardkeep wrote is checked to the last byte, what stock torch wrote by the CRC-32 of its zip
    records. Safetensors files have no checksums.

    Args:
        found: the committed checkpoint.
        sources: locations of its chunks.
        threads: number of threads that read; by default the setting for reads.
        progress: called with the number of bytes checked and to check.
    """
    workers = threads or settings.read_threads()
    checks = _Checks(found, sources, workers)
    if found.kind == "shardkeep":
        checks.shardkeep()
    elif found.kind == "safetensors":
        checks.safetensors()
    else:
        checks.stock()
    damaged = verify_payloads(sources.store, checks.payloads, threads=workers, progress=progress)
    return VerifyReport(
        path=sources.store.url,
        kind=found.kind,
        files=len(sources.index.files),
        checked_bytes=checks.checked + sum(payload.nbytes for payload in checks.payloads),
        damaged=(*checks.damaged, *damaged),
        unchecked=tuple(checks.unchecked),
        unchecked_bytes=sum(checks.unchecked.values()),
    )


class _Checks:
    """The checks of one checkpoint: small parts are checked at once, payloads are collected."""

    def __init__(self, found: Found, sources: ChunkLocations, threads: int) -> None:
        self._found = found
        self._sources = sources
        self._store = sources.store
        self._index = sources.index
        self._threads = threads
        self.payloads: list[StoredPayload] = []
        self.damaged: list[Damaged] = []
        self.unchecked: dict[str, int] = {}
        """Name of what has no checksum -> its number of bytes."""
        self.checked = 0

    def shardkeep(self) -> None:
        """Check the pickle and the frames; collect payloads and objects, which have checksums."""
        self._pickle()
        chunks = self._index.chunks
        items = np.column_stack([chunks.file, chunks.item])
        _, rows = np.unique(items, axis=0, return_index=True)
        self._each(self._framed, sorted(rows.tolist()))
        self._each(self._checksummed_object, range(len(self._index.objects.names)))

    def stock(self) -> None:
        """Collect every record of every item, with its CRC-32."""
        one = self._found.kind == "dcp"
        self.unchecked[METADATA if one else "__*.metadata"] = sum(
            self._store.head(name).size
            for name in self._store.list().files
            if (name == METADATA if one else name.endswith(METADATA) and name != METADATA)
        )
        chunks, objects = self._index.chunks, self._index.objects
        undo = self._index.transforms
        items: dict[ByteRange, tuple[str, tuple[str, ...], int | None]] = {
            self._sources.item(row): (
                self._sources.name(row),
                undo[int(chunks.transform[row])],
                row,
            )
            for row in range(len(chunks.tensor))
        }
        for row, name in enumerate(objects.names):
            where = self._sources.object(row)
            items.setdefault(where, (name, undo[int(objects.transform[row])], None))
        self._each(self._records, items.items())

    def safetensors(self) -> None:
        """Check that the files are long enough for every payload: there are no checksums."""
        sizes = {name: self._store.head(name).size for name in self._index.files}
        for row in range(len(self._index.chunks.tensor)):
            item = self._sources.item(row)
            name = self._sources.name(row)
            if item.offset + item.length > sizes[item.file]:
                self.damaged.append(Damaged("the file is cut short", file=item.file, name=name))
            self.unchecked[name] = self.unchecked.get(name, 0) + item.length

    def _each(self, check: Callable[..., list[StoredPayload]], things: Iterable[object]) -> None:
        """Run a check for each thing, in parallel, and collect payloads and damage in order."""

        def guarded(thing: object) -> list[StoredPayload] | Damaged:
            try:
                return check(thing)
            except Damaged as error:
                return error
            except FormatError as error:
                file = error.file or "?"
                return Damaged(
                    f"{error.place}: {error.what}" if error.place else error.what, file=file
                )

        with ThreadPoolExecutor(self._threads) as pool:
            for found in pool.map(guarded, things):
                if isinstance(found, Damaged):
                    self.damaged.append(found)
                else:
                    self.payloads.extend(found)

    def _pickle(self) -> None:
        trailer = self._found.trailer
        assert trailer is not None
        try:
            trailer.check_pickle(self._store.get_range(METADATA, 0, trailer.pickle_length))
            self.checked += trailer.pickle_length + trailer.manifest_length
        except Damaged as error:
            self.damaged.append(error)

    def _framed(self, row: int) -> list[StoredPayload]:
        """Check the frame of a chunk that Shardkeep wrote; return its payload.

        The frame is known to the byte, and the payload has block checksums.
        """
        chunks, name = self._index.chunks, self._sources.name(row)
        item = self._sources.item(row)
        undo = self._index.transforms[int(chunks.transform[row])]
        if undo:
            return self._records((item, (name, undo, row)))
        source = self._sources.locate([row])[row]
        if item.length == self._sources.nbytes(row):  # In a safetensors file, which has no frames.
            whole = StoredPayload(name, item.file, *source.payload, checksums=source.checksums)
            return [whole] if item.length else []
        dtype = DTYPES[self._index.tensors.dtype[int(chunks.tensor[row])]]
        start, nbytes = source.payload
        head = read_range(self._store, ByteRange(item.file, item.offset, start - item.offset), name)
        end = start + nbytes
        after = ByteRange(item.file, end, item.offset + item.length - end)
        tail = read_range(self._store, after, name)
        crc = whole_crc(() if source.checksums is None else source.checksums, nbytes)
        framing = TensorFraming(dtype, source.sizes)
        frames = (framing(item.offset, False), framing(item.offset - start % PAGE, True))
        if not any(head == frame.head and tail == frame.tail(crc) for frame in frames):
            raise Damaged("the frame around the payload is damaged", file=item.file, name=name)
        self.checked += len(head) + len(tail)
        if not nbytes:
            return []
        return [StoredPayload(name, item.file, start, nbytes, checksums=source.checksums)]

    def _checksummed_object(self, row: int) -> list[StoredPayload]:
        objects, where = self._index.objects, self._sources.object(row)
        name, crc = objects.names[row], int(objects.crc[row])
        return [StoredPayload(name, where.file, where.offset, where.length, crc=crc)]

    def _records(
        self, entry: tuple[ByteRange, tuple[str, tuple[str, ...], int | None]]
    ) -> list[StoredPayload]:
        """Return the records of an item that stock torch wrote: a zip, perhaps compressed."""
        item, (name, undo, row) = entry
        if not undo and row is not None and self._sources.bare(row):
            self.unchecked[name] = self.unchecked.get(name, 0) + item.length
            return []
        if not undo:
            found = container.records(
                window(self._store, item, name), item.length, file=item.file, place=name
            )
            return [
                StoredPayload(
                    name, item.file, item.offset + record.offset, record.nbytes, crc=record.crc32
                )
                for record in found
            ]
        packed = read_range(self._store, item, name)
        limit = unpacked_limit(item.length, None if row is None else self._sources.nbytes(row))
        data = transforms.undo(packed, undo, limit=limit, file=item.file, place=name)
        for record in container.records(inside(data), len(data), file=item.file, place=name):
            if crc32(data[record.offset : record.offset + record.nbytes]) != record.crc32:
                what = f"record {record.name!r} does not match its CRC-32"
                raise Damaged(what, file=item.file, name=name)
        self.checked += len(data)
        return []
