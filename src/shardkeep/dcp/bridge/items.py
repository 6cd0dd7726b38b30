"""Writing of the items of a plan. The planner is asked for the data of each item in its turn."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from shardkeep.errors import FormatError
from shardkeep.format.torch_zip.container_write import TensorFraming
from shardkeep.io.checksums import checksum_payload
from shardkeep.io.pool import parallel
from shardkeep.io.write.append import append_file
from shardkeep.plan.packing import pack
from shardkeep.stores.contract import Store
from shardkeep.torch_state.memory import payload_bytes
from shardkeep.torch_state.objects import to_bytes
from shardkeep.types import DType

__all__ = ["Checksummed", "nbytes_of", "resolved", "result", "write_containers"]


@dataclass(frozen=True)
class Checksummed(WriteResult):  # type: ignore[misc, unused-ignore]
    """A `WriteResult` of torch, with the further facts that Shardkeep's manifest stores.

    Attributes:
        dtype, sizes: dtype and sizes of the tensor as it was written; "" if only its item knows.
        payload: offset of the elements in the item; -1 if they are not stored there as they are.
        checksums: CRC-32 of each block of the payload, little-endian.
        crc: CRC-32 of the stored item of an object; -1 for a tensor.
    """

    dtype: str = ""
    sizes: tuple[int, ...] = ()
    payload: int = -1
    checksums: bytes = b""
    crc: int = -1


def nbytes_of(item: WriteItem) -> int:
    """Return the expected number of bytes of an item's shard; 0 for an object."""
    data = item.tensor_data
    if data is None:
        return 0
    sizes = data.chunk.sizes if data.chunk is not None else data.size
    return int(prod(sizes)) * data.properties.dtype.itemsize


def resolved(item: WriteItem, planner: SavePlanner) -> tuple[DType | None, Any, memoryview]:
    """Return the data that a planner provides for an item.

    Returns:
        Dtype, sizes, and the elements in C order, for a tensor that consists of nothing else.
        Otherwise no dtype, no sizes, and the object or tensor as `torch.save` stores it.
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
            pass  # newer than this list, but torch can store it
        else:
            return dtype, tuple(plain.shape), payload_bytes(plain)
    return None, (), memoryview(to_bytes(plain, name=item.index.fqn))


def result(item: WriteItem, file: str, start: int, length: int, **more: Any) -> Checksummed:
    """Return the result for an item that was written with these stream transforms, if any."""
    transforms = more.pop("transforms", ())
    kind: Any = _StorageInfo
    # Older releases of torch lack this field.
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
    """Write items as torch does: each tensor as a `torch.save` container, objects as they are.

    The planner is asked for the data of an item right before it is written, so that it may use the
    same memory for the next one.

    Args:
        store: the store for the files.
        files: names of new files. The items are distributed over them by size; all are created.
        items: the items of the plan.
        planner: gives the data.
        transforms: torch's stream transforms (`transform_save_stream`); each item is one stream.
        threads: number of files that are written at a time. Each thread calls the planner.

    Returns:
        What was written, in the order of `items`.

    Raises:
        OSError: from the store, naming the file.
    """
    if items and not files:
        raise ValueError(f"{len(items)} items need at least one file, but no file is named")
    place = pack(np.array([nbytes_of(item) for item in items], dtype=np.int64), max(1, len(files)))
    results: dict[int, WriteResult] = {}

    def worker(numbers: Iterator[int]) -> None:
        for number in numbers:
            rows = np.flatnonzero(place == number).tolist()
            written = _write_container_file(
                store, files[number], [items[row] for row in rows], planner, transforms
            )
            results.update(zip(rows, written, strict=True))

    parallel(range(len(files)), worker, threads)
    return [results[row] for row in range(len(items))]


def _write_container_file(
    store: Store, name: str, items: Sequence[WriteItem], planner: SavePlanner, transforms: Any
) -> list[WriteResult]:
    framings: dict[tuple[DType, tuple[int, ...]], TensorFraming] = {}
    described: list[dict[str, Any]] = []
    with append_file(store, name) as file:
        for item in items:
            dtype, sizes, data = resolved(item, planner)
            framing = None
            if dtype is not None:
                framing = framings.get((dtype, sizes)) or TensorFraming(dtype, sizes)
                framings[dtype, sizes] = framing
            stream, about = _streamed(item, framing, data, transforms)
            if dtype is not None:
                about |= {"dtype": dtype.name, "sizes": sizes}
            described.append(about)
            file.append(framing if stream is None else None, data if stream is None else stream)
    written = file.written()
    results: list[WriteResult] = []
    for row, (item, about) in enumerate(zip(items, described, strict=True)):
        start, length = int(written.item[row]), int(written.length[row])
        if item.type == WriteItemType.BYTE_IO:
            about["crc"] = int(written.crc[row])
        elif "dtype" in about and not about["transforms"]:
            blocks = written.checksums[int(written.block[row]) : int(written.block[row + 1])]
            about["checksums"] = blocks.astype("<u4").tobytes()
            about["payload"] = int(written.payload[row]) - start
        results.append(result(item, name, start, length, **about))
    return results


def _streamed(
    item: WriteItem, framing: TensorFraming | None, data: memoryview, transforms: Any
) -> tuple[memoryview | None, dict[str, Any]]:
    """Return an item as its stream transforms it, or None if no transform applies.

    Also returns the names of the transforms, and the block checksums of a tensor's payload.
    """
    if transforms is None:
        return None, {"transforms": ()}
    raw = io.BytesIO()
    stream, names = transforms.transform_save_stream(item, raw)
    if not names:
        return None, {"transforms": ()}
    blocks, crc = checksum_payload(data) if data else (np.zeros(0, np.uint32), 0)
    frame = None if framing is None else framing(0, False)
    parts = (data,) if frame is None else (frame.head, data, frame.tail(crc))
    for part in parts:
        stream.write(part)  # Its result may count transformed bytes.
    stream.close()
    about: dict[str, Any] = {"transforms": tuple(names)}
    if framing is not None:
        about["checksums"] = blocks.astype("<u4").tobytes()
    return raw.getbuffer(), about
