"""Memory for the tensors of a template that have none yet."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner_helpers import _init_state_dict

__all__ = ["take_memory"]


def take_memory(state: Any) -> None:
    """Replace tensors on the meta device by ones on the job's device, or the CPU; in place.

    Torch's own is used for single tensors only: it makes None of values of types it does not know.

    Args:
        state: mappings and lists, nested.

    Raises:
        RuntimeError: a ShardedTensor is on the meta device.
    """
    entries = state.items() if isinstance(state, MutableMapping) else enumerate(state)
    for key, value in list(entries):
        if isinstance(value, torch.Tensor):
            if getattr(value, "device", None) == torch.device("meta"):
                state[key] = _with_memory(value)
        elif isinstance(value, MutableMapping | list):
            take_memory(value)


def _with_memory(tensor: torch.Tensor) -> torch.Tensor:
    if not dist.is_initialized():
        return torch.empty_like(tensor, device="cpu")
    one = {"": tensor}
    _init_state_dict(one)
    return one[""]
