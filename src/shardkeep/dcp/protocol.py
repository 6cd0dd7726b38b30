"""The protocol of plain tensors that are parts of a global one: torch 2.15's, for all releases."""

from __future__ import annotations

from typing import Any

from shardkeep.dcp.bridge.torch_modules import forward_to_torch, torch_module
from shardkeep.torch_state import checkpointable

__all__ = ["CheckpointableTensor"]

CheckpointableTensor: Any = getattr(
    torch_module("protocol"), "CheckpointableTensor", checkpointable.CheckpointableTensor
)
__getattr__ = forward_to_torch("protocol")
