"""Scenarios with saves during training, and with saves by parts of a job."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import shardkeep as sk
from support import sessions
from support.jobs import Net, leaves


def training(rank: int, size: int, path: str, saves: int) -> int:
    """Make both kinds of saves while another thread runs collectives; return their number."""
    mesh = init_device_mesh("cpu", (size,))
    w = distribute_tensor(torch.arange(size * 6.0).reshape(size * 2, 3), mesh, [Shard(0)])
    with sessions.training() as rounds:
        for number in range(saves):
            state = {"w": w, f"mine{rank}": torch.full((4,), float(number)), "n": number}
            if number % 4 == 3:
                sk.save(state, path, overwrite=True)
            else:
                handle = sk.async_save(state, path, overwrite=True)
        handle.result(60)
    return rounds[0]


def halves(rank: int, size: int, path: str, rounds: int) -> list[str]:
    """Save different models on the two halves of a job at once, then one state on each rank.

    In each round but the first, a rank of the second half fails.

    Returns:
        The result of each of this rank's saves, as text.
    """
    half = rank // 2
    members = [2 * half, 2 * half + 1]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("half", "shard"))["shard"]
    torch.manual_seed(half)
    model = Net()
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    torch.manual_seed(7 + half)
    copied = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Linear(3, 2), process_group=groups[half]
    )
    state: dict[str, Any] = {"fsdp": model, "ddp": copied, "half": half}
    ends = []
    for number in range(rounds):
        given = state | ({"bad": lambda: None} if number and rank == 3 else {})
        try:
            save = sk.async_save(given, f"{path}/{half}/{number}", ranks=members)
            save.result(30)
            ends.append("saved")
        except sk.RankFailed as error:
            ends.append(f"told of {error.rank}")
        except sk.Conflict:
            ends.append("raised")
    sk.save({"model": leaves_of(model), "rank": rank}, f"{path}/alone{rank}", ranks=[rank])
    fresh = Net()
    fully_shard(fresh.up, mesh=mesh)
    fully_shard(fresh, mesh=mesh)
    other = torch.nn.Linear(3, 2)
    sk.load(
        {"fsdp": fresh, "ddp": {"module": other.state_dict()}, "half": None},
        f"{path}/{half}/0",
        ranks=members,
    )
    assert leaves(fresh.state_dict()) == leaves(model.state_dict())
    assert leaves(other.state_dict()) == leaves(copied.module.state_dict())
    return ends


def leaves_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return this rank's parts of the model's state dict as plain tensors."""
    return {
        name: tensor.to_local().clone() if hasattr(tensor, "to_local") else tensor
        for name, tensor in model.state_dict().items()
    }
