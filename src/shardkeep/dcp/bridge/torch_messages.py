"""Messages of torch that are kept word for word, since programs match on them.

Each has a test. An error of Shardkeep's own words its text freely, and may add to these.
"""

from __future__ import annotations

__all__ = [
    "CANNOT_DETECT",
    "CHECKPOINT_EXISTS",
    "missing_key",
    "not_a_tensor",
    "size_mismatch",
]

CANNOT_DETECT = "Cannot detect"
"""A checkpoint id that no reader or writer accepts: how torch's message begins."""

CHECKPOINT_EXISTS = "Checkpoint already exists and self.overwrite=False"
"""A save that must not overwrite; a RuntimeError."""


def missing_key(name: str) -> str:
    """A name of the template that the checkpoint lacks; a RuntimeError."""
    return f"Missing key in checkpoint state_dict: {name}."


def not_a_tensor(name: str) -> str:
    """A value that `DynamicMetaLoadPlanner` can't load; a RuntimeError."""
    return f"Non-tensor value identified at {name}"


def size_mismatch(name: str, saved: object, current: object) -> str:
    """A tensor of another shape in the checkpoint; a ValueError.

    Args:
        name: the tensor.
        saved, current: its shapes, which are printed as `torch.Size`.
    """
    return f"Size mismatch between saved {saved} and current: {current} for {name}"
