"""Check every byte of a checkpoint that has a checksum, and say which ones have none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from shardkeep.io.read.copies import Payload, verify_payloads
from shardkeep.settings import PAGE
from shardkeep.types import DTYPES, ByteRange, Progress

__all__ = ["VerifyReport", "verify"]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a check of all bytes found.

    Attributes:
        path: the checkpoint.
        kind: who wrote it, as `Checkpoint.kind`.
        files: how many files its metadata names.
        checked_bytes: bytes that were compared with a digest.
        damaged: what is broken: file, tensor, rank and block of each. An object is one block, with
            one checksum, so there is no block to name.
        unchecked: tensors, objects and files that have no digest. They may be damaged or not.
        unchecked_bytes: how many bytes those are.
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
        """Nothing that was checked is damaged."""
        return not self.damaged


def verify(
    found: Found,
    sources: ChunkLocations,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check all payloads, objects, headers and metadata, in parallel, in bounded memory.

    Damage is collected, not raised. What Shardkeep wrote is checked to the last byte, what stock
    torch wrote by the CRC-32 of its zip records; safetensors have no digests.
    """
    workers = threads or settings.read_threads()
    work = _Work(found, sources, workers)
    if found.kind == "shardkeep":
        work.shardkeep()
    elif found.kind == "safetensors":
        work.safetensors()
    else:
        work.stock()
    damaged = verify_payloads(sources.store, work.payloads, threads=workers, progress=progress)
    return VerifyReport(
        path=sources.store.url,
        kind=found.kind,
        files=len(sources.index.files),
        checked_bytes=work.checked + sum(payload.nbytes for payload in work.payloads),
        damaged=(*work.damaged, *damaged),
        unchecked=tuple(work.unchecked),
        unchecked_bytes=sum(work.unchecked.values()),
    )


class _Work:
    """What there is to check in one checkpoint; the cheap part is checked on the way."""

    def __init__(self, found: Found, sources: ChunkLocations, threads: int) -> None:
        self._found = found
        self._sources = sources
        self._store = sources.store
        self._index = sources.index
        self._threads = threads
        self.payloads: list[Payload] = []
        self.damaged: list[Damaged] = []
        self.unchecked: dict[str, int] = {}
        """What has no checksum -> its bytes."""
        self.checked = 0

    def shardkeep(self) -> None:
        """Block checksums of payloads, the frames around them, objects, `.metadata`'s pickle."""
        self._pickle()
        chunks = self._index.chunks
        items = np.column_stack([chunks.file, chunks.item])
        _, rows = np.unique(items, axis=0, return_index=True)
        self._each(self._framed, sorted(rows.tolist()))
        self._each(self._checksummed_object, range(len(self._index.objects.names)))

    def stock(self) -> None:
        """CRC-32 of every record of every item."""
        one = self._found.kind == "dcp"
        self.unchecked[METADATA if one else "__*.metadata"] = sum(
            self._store.size(name)
            for name in self._store.names()
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
        """They have no checksums; what can be checked is that every payload is there."""
        sizes = {name: self._store.size(name) for name in self._index.files}
        for row in range(len(self._index.chunks.tensor)):
            item = self._sources.item(row)
            name = self._sources.name(row)
            if item.offset + item.length > sizes[item.file]:
                self.damaged.append(Damaged("the file is cut short", file=item.file, name=name))
            self.unchecked[name] = self.unchecked.get(name, 0) + item.length

    def _each(self, check: Callable[..., list[Payload]], things: Iterable[object]) -> None:
        """Check things in parallel, in order; what they leave to be read is collected."""

        def guarded(thing: object) -> list[Payload] | Damaged:
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
            trailer.check_pickle(self._store.read(METADATA, 0, trailer.pickle_length))
            self.checked += trailer.pickle_length + trailer.manifest_length
        except Damaged as error:
            self.damaged.append(error)

    def _framed(self, row: int) -> list[Payload]:
        """A chunk that Shardkeep wrote: its frame is known to the byte, its payload has digests."""
        chunks, name = self._index.chunks, self._sources.name(row)
        item = self._sources.item(row)
        undo = self._index.transforms[int(chunks.transform[row])]
        if undo:
            return self._records((item, (name, undo, row)))
        source = self._sources.locate([row])[row]
        if item.length == self._sources.nbytes(row):  # In a safetensors file: there is no frame.
            whole = Payload(name, item.file, *source.payload, checksums=source.checksums)
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
        return [Payload(name, item.file, start, nbytes, checksums=source.checksums)]

    def _checksummed_object(self, row: int) -> list[Payload]:
        objects, where = self._index.objects, self._sources.object(row)
        name, crc = objects.names[row], int(objects.crc[row])
        return [Payload(name, where.file, where.offset, where.length, crc=crc)]

    def _records(
        self, entry: tuple[ByteRange, tuple[str, tuple[str, ...], int | None]]
    ) -> list[Payload]:
        """An item that stock torch wrote: a zip, perhaps inside a stream transform."""
        item, (name, undo, row) = entry
        if not undo and row is not None and self._sources.bare(row):
            self.unchecked[name] = self.unchecked.get(name, 0) + item.length
            return []
        if not undo:
            found = container.records(
                window(self._store, item, name), item.length, file=item.file, place=name
            )
            return [
                Payload(
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
