"""A 2x2 job of tensor and data parallelism on real ranks, with the process's random generators."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shardkeep as sk


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def state(mesh: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(8, 4, generator=generator)
    rng = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    return {
        "weight": sk.Replicated(distribute_tensor(weight, mesh, [Replicate(), Shard(0)])),
        "rng": sk.PerRank(rng),
    }


def draw() -> tuple[Any, ...]:
    return random.random(), np.random.random(), torch.rand(3).numpy().tobytes()


def tp_dp(rank: int, size: int, path: str) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    seed(rank)
    draw()
    saved = state(mesh)
    handle = sk.async_save(saved, path)
    drawn = draw()
    handle.result(60)
    seed(99)
    later = state(mesh)
    later["weight"].value.to_local().zero_()
    sk.load(later, path)
    rng = later["rng"].value
    random.setstate(rng["python"])
    np.random.set_state(rng["numpy"])
    torch.set_rng_state(rng["torch"])
    assert torch.equal(later["weight"].value.to_local(), saved["weight"].value.to_local())
    assert draw() == drawn
    broken = saved["weight"].value
    if rank == 3:
        broken.to_local()[0, 0] += 1
    try:
        sk.save(saved, path, overwrite=True)
    except sk.Conflict as error:
        assert "tensor 'weight' at [4:8, 0:4] is Replicated" in str(error), error
        assert "on rank 1 than on rank 3" in str(error), error
        return "bit for bit"
    return "replicas that differ were saved"
