"""How a plain tensor says which part of a global one it is: torch 2.15's, for every release."""

from __future__ import annotations

from typing import Any

from shardkeep.dcp.reexports import rest_of, theirs
from shardkeep.torch_state import checkpointable

__all__ = ["CheckpointableTensor"]

CheckpointableTensor: Any = getattr(
    theirs("protocol"), "CheckpointableTensor", checkpointable.CheckpointableTensor
)
__getattr__ = rest_of("protocol")
