"""Reading of the items of a plan into the planner's memory, by the engine's reads."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from shardkeep import settings
from shardkeep.checkpoint.chunk_locations import ChunkLocations, read_range, unpacked_limit
from shardkeep.dcp.bridge.batches import batches
from shardkeep.dcp.bridge.trust import trusted
from shardkeep.errors import Damaged, FormatError, Mismatch
from shardkeep.format.dcp import transforms
from shardkeep.format.names import safe_file_name
from shardkeep.io.checksums import crc32
from shardkeep.io.read.copies import ChunkCopy, read_copies
from shardkeep.plan.reads import ChunkSource
from shardkeep.stores.contract import Store
from shardkeep.torch_state.memory import destination
from shardkeep.torch_state.objects import from_bytes
from shardkeep.types import DTYPES, Box, ByteRange, DType

__all__ = ["PlanReader"]

Unpack = Callable[[ReadItem, Sequence[str], Any], Any]


class PlanReader:
    """Reads the items of one plan.

    Args:
        store: where the files are.
        sources: locations of the chunks of the checkpoint's index, or None without an index.
        places: storage index -> where its item is stored (a `_StorageInfo`, or the like).
        planner: provides the memory.
        unpack: undoes stream transforms (torch's `transform_load_stream`); by default Shardkeep's
            own function.
        cut: returns the bytes of an item, if a subclass has its own way to read them.
    """

    def __init__(
        self,
        store: Store,
        sources: ChunkLocations | None,
        places: Any,
        planner: LoadPlanner,
        *,
        unpack: Unpack | None = None,
        cut: Callable[[Any], bytes] | None = None,
    ) -> None:
        self._store, self._sources, self._places = store, sources, places
        self._planner, self._unpack, self._cut = planner, unpack, cut
        self._rows: dict[tuple[str, int, int], list[int]] = {}
        self._objects: dict[tuple[str, int, int], list[int]] = {}

    def read(self, items: Sequence[ReadItem]) -> None:
        """Read all items into the planner's memory.

        Raises:
            FormatError: an item is malformed, or its path leaves the checkpoint.
            Damaged: bytes are missing or do not match their checksum.
            Mismatch: a stored value does not fit into the planner's memory.
        """
        wanted = [(item, self._place(item)) for item in items]
        wanted.sort(key=lambda one: (one[1].file, one[1].offset))
        self._look_up([place for _, place in wanted])
        tensors = []
        for item, place in wanted:
            if item.type == LoadItemType.BYTE_IO:
                self._planner.load_bytes(item, io.BytesIO(self._bytes(item, place)))
            else:
                tensors.append((item, place))
        for batch in batches(tensors, lambda one: one[1].length, self._planner):
            self._read_batch(batch)

    def _place(self, item: ReadItem) -> ByteRange:
        info = self._places[item.storage_index]
        return ByteRange(safe_file_name(info.relative_path), int(info.offset), int(info.length))

    def _look_up(self, places: Sequence[ByteRange]) -> None:
        """Find the rows of the index that belong to these items."""
        if self._sources is None:
            return
        files = self._sources.index.files
        wanted = {place.file for place in places}
        numbers = [number for number, file in enumerate(files) if file in wanted]
        starts = np.array([place.offset for place in places], dtype=np.int64)
        for table, known in (
            (self._sources.index.chunks, self._rows),
            (self._sources.index.objects, self._objects),
        ):
            rows = np.flatnonzero(np.isin(table.file, numbers) & np.isin(table.item, starts))
            columns = (table.file[rows], table.item[rows], table.length[rows], rows)
            for file, start, length, row in zip(*(c.tolist() for c in columns), strict=True):
                known.setdefault((files[file], start, length), []).append(row)

    def _read_batch(self, batch: list[tuple[ReadItem, ByteRange]]) -> None:
        copies: list[ChunkCopy] = []
        finish: list[Callable[[], None]] = []
        rows = {id(item): self._row(item, place) for item, place in batch}
        sources = self._locate([row for row in rows.values() if row is not None])
        for item, place in batch:
            target = self._planner.resolve_tensor(item).detach()
            box = Box(tuple(item.storage_offsets), tuple(item.lengths))
            if tuple(target.shape) != box.sizes:
                raise Mismatch(
                    f"{item.storage_index.fqn}: the plan reads a part of shape {list(box.sizes)}, "
                    f"but the planner provides a tensor of shape {list(target.shape)} for it"
                )
            row = rows[id(item)]
            if row is None or row not in sources or not _is_memory(target):
                self._read_alone(item, place, target, box)
            else:
                array, done = destination(target, self._dtype(row))
                copies.append(ChunkCopy(item.storage_index.fqn, sources[row], box, array))
                finish.append(done)
            finish.append(partial(self._planner.commit_tensor, item, target))
        read_copies(self._store, copies, threads=settings.read_threads())
        for done in finish:
            done()

    def _locate(self, rows: list[int]) -> dict[int, ChunkSource]:
        """Return the sources of chunks, except where the items differ from the metadata."""
        if self._sources is None:
            return {}
        with suppress(FormatError):
            return self._sources.locate(rows)
        found: dict[int, ChunkSource] = {}
        for row in rows:
            with suppress(FormatError):
                found |= self._sources.locate([row])
        return found

    def _dtype(self, row: int) -> DType:
        assert self._sources is not None
        index = self._sources.index
        dtype: DType = DTYPES[index.tensors.dtype[int(index.chunks.tensor[row])]]
        return dtype

    def _row(self, item: ReadItem, place: ByteRange) -> int | None:
        """Return the chunk of an item, or None if only the item itself says what it holds."""
        assert item.storage_index is not None
        rows = self._rows.get((place.file, place.offset, place.length))
        if not rows or self._sources is None or self._cut is not None:
            return None
        named = (row for row in rows if self._sources.name(row) == item.storage_index.fqn)
        row = next(named, rows[0])
        if self._dtype(row).name.startswith("q"):
            return None  # The scale is stored in the item.
        streamed = self._sources.index.chunks.transform[row] > 0
        return None if streamed and self._unpack is not None else row

    def _read_alone(self, item: ReadItem, place: ByteRange, target: torch.Tensor, box: Box) -> None:
        """Read an item by what it holds: the index lacks it, or its target is not plain memory."""
        name = item.storage_index.fqn
        value = from_bytes(self._bytes(item, place), name=name, trust=trusted())
        if not isinstance(value, torch.Tensor):
            raise Mismatch(f"{name}: stored as a {type(value).__name__}; the plan reads a tensor")
        for dim, (start, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
            if (start, size) != (0, value.shape[dim]):
                value = value.narrow(dim, start, size)
        with torch.no_grad():
            target.copy_(value)

    def _bytes(self, item: ReadItem, place: ByteRange) -> bytes:
        """Return the bytes of an item without its transforms, checked if a checksum is known."""
        info = self._places[item.storage_index]
        name = item.storage_index.fqn
        data = read_range(self._store, place, name) if self._cut is None else self._cut(info)
        rows = self._objects.get((place.file, place.offset, place.length))
        if rows and self._sources is not None and self._cut is None:
            crc = int(self._sources.index.objects.crc[rows[0]])
            if crc >= 0 and crc32(data) != crc:
                raise Damaged("bytes do not match their checksum", file=place.file, name=name)
        undo = tuple(getattr(info, "transform_descriptors", None) or ())
        if self._unpack is not None:
            # Torch lists the last transform first, and undoes transforms in the given order.
            return bytes(self._unpack(item, undo[::-1], io.BytesIO(data)).read(-1))
        if not undo:
            return data
        limit = unpacked_limit(len(data))
        return transforms.undo(data, undo, limit=limit, file=place.file, place=name)


def _is_memory(tensor: torch.Tensor) -> bool:
    """Return whether bytes can be read into a tensor, or copied to it from a buffer."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return plain and tensor.layout is torch.strided and not tensor.is_quantized
