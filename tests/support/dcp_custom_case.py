"""What a case of `dcp_custom` is, and the state that it saves."""

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
    """What is saved and loaded, and how. By default all of it comes back."""

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
    """A replica, a shard of each rank, a value that is the same and one that is a rank's own."""
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
    """The same state with other values."""
    if isinstance(value, dict):
        return {name: cleared(inner) for name, inner in value.items()}
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    return None


def local(value: Any) -> Any:
    """A state of plain tensors."""
    if isinstance(value, dict):
        return {name: local(inner) for name, inner in value.items()}
    return value.to_local() if isinstance(value, DTensor) else value


def apply(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, dict):
        return {name: apply(inner, function) for name, inner in value.items()}
    return function(value) if isinstance(value, torch.Tensor) else value
