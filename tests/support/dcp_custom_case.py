"""The description of a case of `dcp_custom`, and the state that the cases save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import shardkeep.dcp as dcp
from support.scenarios import values

BASES = {"stock": stock, "ours": dcp}
Base = Any


@dataclass
class Made:
    """A state with the options for saving and loading it; by default all of it is loaded."""

    state: dict[str, Any]
    saving: dict[str, Any]
    loading: dict[str, Any]
    template: dict[str, Any] | None = None
    expected: dict[str, Any] | None = None
    then: Callable[[], None] = lambda: None


Case = Callable[..., Made]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def state(rank: int, size: int) -> dict[str, Any]:
    """Return a state with a replica, a shard, an equal value on all ranks, and one per rank."""
    sharded = values("sharded", (4 * size, 3), torch.float32).clamp(-1e9, 1e9).nan_to_num()
    local = sharded[4 * rank : 4 * rank + 4].clone()
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (size,))
        local = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    return {
        "model": {"w": values("w", (3, 5), torch.int32).clone(), "sharded": local},
        "skipped": torch.arange(6.0),
        "step": 7,
        f"rank{rank}": {"position": rank, "names": ("a", rank)},
    }


def cleared(value: Any) -> Any:
    """Return the same state with other values."""
    if isinstance(value, dict):
        return {name: cleared(inner) for name, inner in value.items()}
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    return None


def local(value: Any) -> Any:
    """Return the state with each DTensor replaced by its local tensor."""
    if isinstance(value, dict):
        return {name: local(inner) for name, inner in value.items()}
    return value.to_local() if isinstance(value, DTensor) else value


def apply(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, dict):
        return {name: apply(inner, function) for name, inner in value.items()}
    return function(value) if isinstance(value, torch.Tensor) else value
