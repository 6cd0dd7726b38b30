"""The items of a plan as safetensors files, which any reader of that format opens.

Objects are stored as tensors of bytes. Shards of one tensor in one file have different names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from shardkeep.dcp.bridge.items import nbytes_of, resolved, result
from shardkeep.errors import Conflict
from shardkeep.format.safetensors.write import layout, of_parts
from shardkeep.io.memory_payloads import BytesPayloads
from shardkeep.io.pool import parallel
from shardkeep.io.write.files import write_plain_file
from shardkeep.plan.memory_budget import MemoryBudget
from shardkeep.plan.packing import pack
from shardkeep.stores.contract import Store
from shardkeep.types import Box, DType

__all__ = ["write_tensor_files"]

_BYTES = DType.named("uint8")


def write_tensor_files(
    store: Store,
    files: Sequence[str],
    items: Sequence[WriteItem],
    planner: SavePlanner,
    *,
    threads: int = 1,
) -> list[WriteResult]:
    """Write items to safetensors files.

    The header comes first in such a file, so the planner is asked for the data of all items of a
    file before it is written.

    Args:
        store: the store for the files.
        files: names of new files. The items are distributed over them by size; all are created.
        items: the items of the plan.
        planner: gives the data.
        threads: number of files that are written at a time. Each thread calls the planner.

    Returns:
        What was written.

    Raises:
        Conflict: the format cannot hold a tensor; the message names it.
        OSError: from the store, naming the file.
    """
    sizes = np.array([nbytes_of(item) for item in items], dtype=np.int64)
    place = pack(sizes, max(1, len(files)))
    results: dict[int, list[WriteResult]] = {}
    window_bytes = MemoryBudget.of(None).window_bytes(min(threads, len(files)))

    def worker(numbers: Iterator[int]) -> None:
        for number in numbers:
            its_items = [items[row] for row in np.flatnonzero(place == number).tolist()]
            results[number] = _write_tensor_file(
                store, files[number], its_items, planner, window_bytes
            )

    parallel(range(len(files)), worker, threads)
    return [written for number in range(len(files)) for written in results[number]]


@dataclass(frozen=True, slots=True)
class _FileTensor:
    """A tensor of a file, or the bytes of an object."""

    item: WriteItem
    dtype: DType
    sizes: tuple[int, ...]
    data: memoryview


def _write_tensor_file(
    store: Store,
    file: str,
    items: Sequence[WriteItem],
    planner: SavePlanner,
    max_window_bytes: int,
) -> list[WriteResult]:
    header, tensors = _resolved_tensors(items, planner)
    payloads = BytesPayloads([memoryview(header), *(tensor.data for tensor in tensors)])
    rows = np.arange(len(tensors) + 1)
    written = write_plain_file(
        store,
        file,
        rows,
        payloads.nbytes,
        payloads,
        max_window_bytes=max_window_bytes,
        checksums=True,
    )
    results: list[WriteResult] = []
    for row, tensor in enumerate(tensors, 1):  # the header is the first payload
        if tensor.item.type == WriteItemType.BYTE_IO:
            about: dict[str, Any] = {"crc": int(written.crc[row])}
        else:
            blocks = written.checksums[int(written.block[row]) : int(written.block[row + 1])]
            about = {"dtype": tensor.dtype.name, "sizes": tensor.sizes, "payload": 0}
            about["checksums"] = blocks.astype("<u4").tobytes()
        start = int(written.layout.payload[row])
        results.append(result(tensor.item, file, start, tensor.data.nbytes, **about))
    return results


def _resolved_tensors(
    items: Sequence[WriteItem], planner: SavePlanner
) -> tuple[bytes, list[_FileTensor]]:
    """Return the header of a file with these items, and its tensors in the order of the file."""
    tensors: dict[str, _FileTensor] = {}
    begins: dict[str, tuple[int, ...]] = {}
    for item in items:
        dtype, sizes, data = resolved(item, planner)
        name = item.index.fqn
        if item.type == WriteItemType.BYTE_IO:
            dtype, sizes = _BYTES, (data.nbytes,)
        if dtype is None:
            raise Conflict(f"tensor {name!r}: safetensors files cannot hold a tensor of its kind")
        chunk = item.tensor_data.chunk if item.tensor_data else None
        if name in tensors and chunk is not None:
            name = f"{name} {Box(tuple(chunk.offsets), tuple(chunk.sizes))}"
        tensors[name] = _FileTensor(item, dtype, sizes, data)
        begins[name] = tuple(chunk.offsets) if chunk is not None else (0,)
    shapes = {name: (tensor.dtype, tensor.sizes) for name, tensor in tensors.items()}
    laid_out = layout(shapes, of_parts(begins))
    return laid_out.header, [tensors[name] for name in laid_out.names]
