"""The items of a plan as safetensors files: whole ones, which any reader of that format opens.

Objects are in them as tensors of bytes. Two shards of one tensor have two names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from shardkeep.dcp.bridge.items import nbytes_of, resolved, result
from shardkeep.errors import Conflict
from shardkeep.format.safetensors.write import layout, of_parts
from shardkeep.io.write.items import Bare, Item, write_items
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
    """Write items to as many safetensors files as are named. Arguments as of `write_containers`.

    Raises:
        Conflict: a tensor that the format does not have; it is named.
    """
    sizes = np.array([nbytes_of(item) for item in items], dtype=np.int64)
    place = pack(sizes, max(1, len(files)))
    shares = {
        file: _Share([items[row] for row in np.flatnonzero(place == number).tolist()], planner)
        for number, file in enumerate(files)
    }
    content = {file: share.items() for file, share in shares.items()}
    written = write_items(store, content, threads=threads)
    results: list[WriteResult] = []
    row = -1
    for file, share in shares.items():
        row += 1  # the header
        for part in share.parts:
            row += 1
            if part.item.type == WriteItemType.BYTE_IO:
                more: dict[str, Any] = {"crc": int(written.crc[row])}
            else:
                blocks = written.checksums[int(written.block[row]) : int(written.block[row + 1])]
                more = {"dtype": part.dtype.name, "sizes": part.sizes, "payload": 0}
                more["checksums"] = blocks.astype("<u4").tobytes()
            start = int(written.payload[row])
            results.append(result(part.item, file, start, part.data.nbytes, **more))
    return results


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of a file, or an object's bytes."""

    item: WriteItem
    dtype: DType
    sizes: tuple[int, ...]
    data: memoryview


class _Share:
    """What goes to one file; the codec of its header. Data is asked for when that is wanted."""

    def __init__(self, items: Sequence[WriteItem], planner: SavePlanner) -> None:
        self._items, self._planner = items, planner
        self.parts: list[_Part] = []

    def items(self) -> list[Item]:
        """For the engine: an item that is only a head, the file's, then the parts."""
        parts = [Item(Bare(0), partial(self._data, number)) for number in range(len(self._items))]
        return [Item(self, memoryview(b"")), *parts]

    def head(self, position: int) -> bytes:
        """The header of the file."""
        parts: dict[str, _Part] = {}
        begins: dict[str, tuple[int, ...]] = {}
        for item in self._items:
            dtype, sizes, data = resolved(item, self._planner)
            name = item.index.fqn
            if item.type == WriteItemType.BYTE_IO:
                dtype, sizes = _BYTES, (data.nbytes,)
            if dtype is None:
                raise Conflict(f"tensor {name!r}: safetensors files have none of its kind")
            chunk = item.tensor_data.chunk if item.tensor_data else None
            if name in parts and chunk is not None:
                name = f"{name} {Box(tuple(chunk.offsets), tuple(chunk.sizes))}"
            parts[name] = _Part(item, dtype, sizes, data)
            begins[name] = tuple(chunk.offsets) if chunk is not None else (0,)
        laid_out = layout({n: (p.dtype, p.sizes) for n, p in parts.items()}, of_parts(begins))
        self.parts = [parts[name] for name in laid_out.names]
        return laid_out.header

    def tail(self, position: int, crc: int) -> bytes:
        return b""

    def _data(self, number: int) -> memoryview:
        return self.parts[number].data
