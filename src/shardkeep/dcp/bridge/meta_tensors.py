"""Memory for the tensors of a template that have none yet."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner_helpers import _init_state_dict

__all__ = ["allocate_meta_tensors"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Classes whose `is_meta` can be asked; some subclasses have no device, or raise."""


def allocate_meta_tensors(state: Any) -> None:
    """Replace tensors on the meta device, in place, with ones on the job's device or the CPU.

    Torch's own function is called for single tensors only: in a whole state it replaces values of
    types that it does not know with None.

    Args:
        state: nested mappings and lists.

    Raises:
        RuntimeError: a ShardedTensor is on the meta device.
    """
    entries = state.items() if isinstance(state, MutableMapping) else enumerate(state)
    # A list of all pairs would have Python's garbage collector run over the whole state.
    without_memory = []
    for key, value in entries:
        if type(value) in _PLAIN:
            if value.is_meta:
                without_memory.append(key)
        elif isinstance(value, torch.Tensor):
            if getattr(value, "device", None) == torch.device("meta"):
                without_memory.append(key)
        elif isinstance(value, MutableMapping | list):
            allocate_meta_tensors(value)
    for key in without_memory:
        state[key] = _allocated(state[key])


def _allocated(tensor: torch.Tensor) -> torch.Tensor:
    if not dist.is_initialized():
        return torch.empty_like(tensor, device="cpu")
    state = {"": tensor}
    _init_state_dict(state)
    return state[""]
