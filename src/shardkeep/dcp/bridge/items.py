"""The items of a plan into files, by the engine; the planner is asked for each in its turn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from shardkeep.errors import FormatError
from shardkeep.format.torch_zip.container_write import TensorItem
from shardkeep.io.checksums import checksum_payload, whole_crc
from shardkeep.io.contract import Codec
from shardkeep.io.write.items import Bare, Item, write_packed
from shardkeep.stores.contract import Store
from shardkeep.torch_state.memory import payload_bytes
from shardkeep.torch_state.objects import to_bytes
from shardkeep.types import DType

__all__ = ["Checksummed", "nbytes_of", "resolved", "result", "write_containers"]


@dataclass(frozen=True)
class Checksummed(WriteResult):  # type: ignore[misc, unused-ignore]
    """A result as torch knows it, and what Shardkeep's manifest says besides.

    Attributes:
        dtype, sizes: of a tensor, as it was written; no dtype if only its item knows.
        payload: where its bytes start in the item; negative if they don't lie there as they are.
        checksums: CRC-32 of each block of the payload, little-endian.
        crc: CRC-32 of an object's item, as it is stored; -1 for a tensor.
    """

    dtype: str = ""
    sizes: tuple[int, ...] = ()
    payload: int = -1
    checksums: bytes = b""
    crc: int = -1


def nbytes_of(item: WriteItem) -> int:
    """Bytes of the shard that an item holds, as far as is known; 0 for an object."""
    data = item.tensor_data
    if data is None:
        return 0
    sizes = data.chunk.sizes if data.chunk is not None else data.size
    return int(prod(sizes)) * data.properties.dtype.itemsize


def resolved(item: WriteItem, planner: SavePlanner) -> tuple[DType | None, Any, memoryview]:
    """What a planner gives for an item.

    Returns:
        Dtype and sizes of a tensor that is nothing but its elements, and those in C order; else no
        dtype, and bytes as `torch.save` makes them.
    """
    data: Any = planner.resolve_data(item)
    if item.type == WriteItemType.BYTE_IO:
        view = data.getbuffer() if isinstance(data, io.BytesIO) else memoryview(data)
        return None, (), view.cast("B")
    plain = data.detach()
    if type(plain) is torch.Tensor and plain.layout is torch.strided and not plain.is_quantized:
        try:
            dtype = DType.named(str(plain.dtype))
        except FormatError:
            pass  # newer than this list: torch knows how to store it
        else:
            return dtype, tuple(plain.shape), payload_bytes(plain)
    return None, (), memoryview(to_bytes(plain, name=item.index.fqn))


def result(item: WriteItem, file: str, start: int, length: int, **more: Any) -> Checksummed:
    """What became of an item. `transforms` names those of its stream, if there are any."""
    transforms = more.pop("transforms", ())
    kind: Any = _StorageInfo
    # Older releases have no such field.
    place = kind(file, start, length, *([list(transforms)] if transforms else []))
    return Checksummed(item.index, length, place, **more)


def write_containers(
    store: Store,
    files: Sequence[str],
    items: Sequence[WriteItem],
    planner: SavePlanner,
    *,
    transforms: Any = None,
    threads: int = 1,
) -> list[WriteResult]:
    """Write items as torch does: each tensor a `torch.save` container, objects as they are.

    Args:
        store: where to.
        files: new ones, shared out evenly in bytes; all of them exist then.
        items: of the plan.
        planner: gives the data.
        transforms: torch's stream transforms (`transform_save_stream`); each item is one stream.
        threads: how many files are written at a time; the planner is called by them.
    """
    writing = [_Writing(item, planner, transforms) for item in items]
    written = write_packed(
        store, files, [Item(one, one.payload) for one in writing], threads=threads
    )
    results: list[WriteResult] = []
    for row, one in enumerate(writing):
        start, length = int(written.item[row]), int(written.length[row])
        more: dict[str, Any] = {"transforms": one.transforms}
        if one.item.type == WriteItemType.BYTE_IO:
            more["crc"] = int(written.crc[row])
        elif one.dtype is not None:
            more |= {"dtype": one.dtype.name, "sizes": one.sizes}
            if one.transforms:
                more["checksums"] = one.checksums
            else:
                blocks = written.checksums[int(written.block[row]) : int(written.block[row + 1])]
                more["checksums"] = blocks.astype("<u4").tobytes()
                more["payload"] = int(written.payload[row]) - start
        results.append(result(one.item, written.files[written.file[row]], start, length, **more))
    return results


class _Writing:
    """One item: its data is asked for when its head is wanted, and let go with its tail."""

    def __init__(self, item: WriteItem, planner: SavePlanner, transforms: Any) -> None:
        self.item = item
        self.nbytes = nbytes_of(item)
        self.dtype: DType | None = None
        self.sizes: tuple[int, ...] = ()
        self.transforms: tuple[str, ...] = ()
        self.checksums = b""
        self._planner, self._stream = planner, transforms
        self._codec: Codec = Bare(0)
        self._data = memoryview(b"")

    def head(self, position: int) -> bytes:
        self.dtype, self.sizes, self._data = resolved(self.item, self._planner)
        if self.dtype is not None:
            self._codec = TensorItem(self.dtype, self.sizes)
        if self._stream is not None:
            self._transform()
        return self._codec.head(position)

    def payload(self) -> memoryview:
        return self._data

    def tail(self, position: int, crc: int) -> bytes:
        self._data = memoryview(b"")
        return self._codec.tail(position, crc)

    def _transform(self) -> None:
        """Make the item what its stream makes of its bytes."""
        raw = io.BytesIO()
        stream, names = self._stream.transform_save_stream(self.item, raw)
        if not names:
            return
        blocks, _ = checksum_payload(self._data) if self._data else (np.zeros(0, np.uint32), 0)
        crc = whole_crc(blocks, len(self._data))
        for part in (self._codec.head(0), self._data, self._codec.tail(0, crc)):
            stream.write(part)  # What it returns may count what came out of it.
        stream.close()
        self.transforms, self.checksums = tuple(names), blocks.astype("<u4").tobytes()
        self._codec, self._data = Bare(raw.getbuffer().nbytes), raw.getbuffer()
