"""Scenarios of Hugging Face storage on real ranks, and states for them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shardkeep.dcp as dcp
from shardkeep.dcp._consolidate_hf_safetensors import consolidate_safetensors_files_on_every_rank
from shardkeep.format.safetensors.parse import KINDS
from support.scenarios import same, values

FLOAT4 = "float4_e2m1fn_x2"


def dtypes(like_stock: bool = False) -> list[torch.dtype]:
    """Return the dtypes of safetensors that this torch can shard, or that stock torch reads."""
    kinds = [kind for kind in KINDS if kind != "F4"]
    if like_stock:
        known = importlib.import_module("safetensors.torch")._TYPES
        kinds = [kind for kind in kinds if kind in known]
    found = (getattr(torch, KINDS[kind], None) for kind in kinds)
    return [dtype for dtype in found if dtype is not None]


class Parts(torch.Tensor):
    """A tensor that one process holds in several parts; `whole` has all of it."""

    @staticmethod
    def of(whole: torch.Tensor, boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Parts:
        made = whole.as_subclass(Parts)
        made.plain = whole
        made.chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in boxes]
        return made

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.plain)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.plain.shape),
            )
            for chunk in self.chunks
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self.chunks

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        chunk = next(c for c in self.chunks if c.offsets == index.offset)
        cut = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        return self.plain[cut]


def wholes(like_stock: bool = True) -> dict[str, torch.Tensor]:
    made = {
        f"{kind}.{dtype}".replace("torch.", ""): values(f"{kind}{dtype}", (5, 6), dtype)
        for kind in ("rows", "columns", "tiles", "copies")
        for dtype in dtypes(like_stock)
    }
    return {
        **made,
        "plain": values("plain", (3,), torch.int16),
        "few": values("f", (2, 2), torch.int8),
    }


def laid_out(tensors: dict[str, torch.Tensor], turned: bool = False) -> dict[str, Any]:
    """Shard each tensor as its name says; with `turned`, by another kind of placement."""
    mesh = init_device_mesh("cpu", (2, 2))
    kinds = {
        "rows": [Shard(0), Replicate()],
        "columns": [Replicate(), Shard(1)],
        "tiles": [Shard(0), Shard(1)],
        "copies": [Replicate(), Replicate()],
        "few": [Shard(0), Shard(0)],  # some ranks have an empty shard
    }
    others = {**dict(zip(kinds, [*list(kinds.values())[1:4], kinds["rows"]], strict=False)),
              "few": kinds["columns"]}  # fmt: skip
    chosen = others if turned else kinds
    state: dict[str, Any] = {}
    for name, whole in tensors.items():
        placements = chosen.get(name.split(".")[0])
        if placements is None:
            state[name] = whole.clone()
            continue
        # As bytes, since communication does not support every dtype.
        size = whole.element_size()
        raw = whole.view(torch.uint8).reshape(*whole.shape, size)
        local = distribute_tensor(raw, mesh, placements).to_local().contiguous()
        local = local.view(whole.dtype).reshape(local.shape[:-1])
        state[name] = torch.distributed.tensor.DTensor.from_local(
            local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )
    return state


def blank(state: dict[str, Any]) -> dict[str, Any]:
    for value in state.values():
        (value.to_local() if hasattr(value, "to_local") else value).view(torch.uint8).zero_()
    return state


def equal(state: dict[str, Any], other: dict[str, Any]) -> bool:
    def local(value: Any) -> torch.Tensor:
        return value.to_local() if hasattr(value, "to_local") else value

    return all(same(local(state[name]), local(other[name])) for name in other)


def mapping(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: 1 + number % 3 for number, name in enumerate(tensors)}


def save_and_load(rank: int, size: int, path: str) -> str:
    for where, tensors in (("one", wholes(like_stock=False)), ("three", wholes())):
        given = mapping(tensors) if where == "three" else None
        state = laid_out(tensors)
        writer = dcp.HuggingFaceStorageWriter(
            f"{path}/{where}",
            fqn_to_index_mapping=given,
            save_distributed=True,
            enable_consolidation=True,
            thread_count_consolidation=2,
        )
        dcp.save(state, storage_writer=writer)
        for folder in (f"{path}/{where}", f"{path}/{where}/sharded"):
            for turned in (False, True):
                loaded = blank(laid_out(tensors, turned))
                dcp.load(loaded, storage_reader=dcp.HuggingFaceStorageReader(folder))
                assert equal(loaded, laid_out(tensors, turned)), (folder, turned)
    dist.barrier()
    if hasattr(stock, "HuggingFaceStorageReader"):
        loaded = blank(laid_out(tensors, True))
        reader = stock.HuggingFaceStorageReader(f"{path}/three/sharded")
        stock.load(loaded, storage_reader=reader)
        assert equal(loaded, laid_out(tensors, True))
    return "fine"


def stocks_shards(rank: int, size: int, path: str) -> str:
    """Consolidate a checkpoint of stock torch on all ranks."""
    tensors = wholes()
    state = laid_out(tensors)
    given = mapping(tensors)
    writer = stock.HuggingFaceStorageWriter(path, fqn_to_index_mapping=given, save_distributed=True)
    stock.save(state, storage_writer=writer)
    loaded = blank(laid_out(tensors, True))
    dcp.load(loaded, storage_reader=dcp.HuggingFaceStorageReader(path))
    assert equal(loaded, laid_out(tensors, True))
    consolidate_safetensors_files_on_every_rank(path, f"{path}/whole", given)
    return "fine"


def every_rank_fails(rank: int, size: int, path: str) -> str:
    given = {"a": 1, "b": 2, "c": 3, "d": 4}
    if rank == 2:
        del given["c"]
    try:
        consolidate_safetensors_files_on_every_rank(path, f"{path}/whole", given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def replicas(rank: int, size: int, path: str) -> str:
    """Save plain tensors, equal on all ranks, without save_distributed, as with DDP."""
    state = {f"w{n}": values(f"w{n}", (4, n + 1), torch.float32) for n in range(6)}
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(path))
    loaded = {name: torch.zeros_like(value) for name, value in state.items()}
    dcp.load(loaded, storage_reader=dcp.HuggingFaceStorageReader(path))
    assert equal(loaded, state)
    try:
        given = dict.fromkeys(state, 1)
        writer = dcp.HuggingFaceStorageWriter(f"{path}/mapped", fqn_to_index_mapping=given)
        dcp.save(state, storage_writer=writer)
    except dcp.CheckpointException as error:
        assert "pass save_distributed=True, enable_consolidation=True" in str(error)
    else:
        return "two ranks wrote one file"
    lowest = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    dcp.save(state, storage_writer=writer, planner=lowest)
    return "fine"


def refused(rank: int, size: int, path: str) -> str:
    state = {"w": torch.ones(3), **({"epoch": 3, "name": "n"} if rank == 1 else {})}
    try:
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(path, save_distributed=True))
    except dcp.CheckpointException as error:
        return str(error) + f" | {list(Path(path).iterdir())}"
    return "no error"


def parts_without_distributed(rank: int, size: int, path: str) -> str:
    try:
        dcp.save(laid_out(wholes()), storage_writer=dcp.HuggingFaceStorageWriter(path))
    except dcp.CheckpointException as error:
        return str(error)
    return "no error"


def fewer_ranks_later(rank: int, size: int, path: str) -> str:
    def save(number: float, **more: Any) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        whole = torch.arange(8.0) + number
        writer = dcp.HuggingFaceStorageWriter(path, save_distributed=True, **more)
        dcp.save({"w": distribute_tensor(whole, mesh, [Shard(0)])}, storage_writer=writer)

    save(0)
    save(1, enable_consolidation=True)
    save(2)
    dist.barrier()
    if rank == 0:
        writer = dcp.HuggingFaceStorageWriter(path, save_distributed=True)
        dcp.save({"w": torch.arange(8.0) + 3}, storage_writer=writer, no_dist=True)
    dist.barrier()
    return "fine"


def for_themselves(rank: int, size: int, path: str) -> str:
    """Save with `use_collectives=False`, so that each rank is its own coordinator."""
    writer = dcp.HuggingFaceStorageWriter(path, save_distributed=True)
    dcp.save({f"of {rank}": torch.full((2,), rank)}, storage_writer=writer, use_collectives=False)
    dist.barrier()
    loaded = {f"of {n}": torch.zeros(2, dtype=torch.int64) for n in range(size)}
    dcp.load(loaded, storage_reader=dcp.HuggingFaceStorageReader(path))
    assert all(loaded[f"of {n}"].tolist() == [n, n] for n in range(size))
    return "fine"
