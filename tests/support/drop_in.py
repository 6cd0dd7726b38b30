"""Scenarios of `shardkeep.dcp` and stock torch on real ranks, each reading the other's files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shardkeep.dcp as dcp
from support.scenarios import same, values


def both_ways(rank: int, size: int, path: str) -> str:
    mesh = init_device_mesh("cpu", (2, 2))
    whole = values("w", (7, 5), torch.float32)

    def state(tensor: torch.Tensor, placements: Any, step: int) -> dict[str, Any]:
        laid_out = distribute_tensor(tensor, mesh, placements)
        return {"model": {"w": laid_out, "bias": tensor[0].clone()}, "step": step, str(rank): rank}

    for number, (writer, reader) in enumerate([(dcp, stock), (stock, dcp), (dcp, dcp)]):
        writer.save(state(whole, [Shard(0), Shard(1)], 3), checkpoint_id=f"{path}/all")
        dist.barrier()
        blank = state(torch.zeros_like(whole), [Replicate(), Shard(0)], 0)
        blank[str(rank)] = None
        reader.load(blank, checkpoint_id=f"{path}/all")
        assert same(blank["model"]["w"].full_tensor(), whole), number
        assert same(blank["model"]["bias"], whole[0])
        assert (blank["step"], blank[str(rank)]) == (3, rank)
        dist.barrier()
    _group(rank, path)
    return "fine"


def _group(rank: int, path: str) -> None:
    group = dist.new_group([1, 3])
    if rank in (1, 3):
        dcp.save({"mine": {rank: torch.tensor([rank])}}, checkpoint_id=f"{path}/group",
                 process_group=group)  # fmt: skip
        loaded = {"mine": {1: torch.zeros(1, dtype=torch.int64)}}
        dcp.load(loaded, checkpoint_id=f"{path}/group", process_group=group)
        assert loaded["mine"][1].item() == 1
    dist.barrier()
    loaded = {"mine": {3: torch.zeros(1, dtype=torch.int64)}}
    dcp.load(loaded, checkpoint_id=f"{path}/group", no_dist=True)
    assert loaded["mine"][3].item() == 3


def own_names_for_one_place(rank: int, size: int, path: str) -> str:
    """Save under a different name of the same folder on each rank; load from a copy on each."""
    Path(path, "real").mkdir(exist_ok=True)
    mine = Path(path, f"link{rank}")
    mine.symlink_to(Path(path, "real"), target_is_directory=True)
    dcp.save({"w": torch.full((3,), 2.0), str(rank): rank}, checkpoint_id=mine)
    dist.barrier()
    shutil.copytree(Path(path, "real"), Path(path, f"copy{rank}"))
    loaded = {"w": torch.zeros(3), str(1 - rank): None}
    dcp.load(loaded, checkpoint_id=Path(path, f"copy{rank}"))
    assert loaded["w"].tolist() == [2.0] * 3
    assert loaded[str(1 - rank)] == 1 - rank
    return "fine"


def disks_of_their_own(rank: int, size: int, path: str) -> str:
    """Save from each rank to a folder that no other rank sees."""
    try:
        dcp.save({str(rank): torch.ones(3)}, checkpoint_id=f"{path}/disk{rank}")
    except dcp.CheckpointException as error:
        return str(error)
    return "nothing"
