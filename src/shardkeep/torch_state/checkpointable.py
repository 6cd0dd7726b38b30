"""Plain tensors whose attributes describe the shards that they hold (torch 2.15's protocol)."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

from shardkeep.errors import Conflict
from shardkeep.types import Box

__all__ = ["CheckpointableTensor", "is_checkpointable", "shard_boxes"]

_Ints = tuple[int, ...]


@runtime_checkable
class CheckpointableTensor(Protocol):
    """A local tensor that holds N shards of a global one, as its attributes describe.

    Attributes:
        global_shape: the shape of the global tensor.
        global_offsets: the offsets of each shard in the global tensor.
        local_offsets: the offsets of each shard in the local tensor.
        local_sizes: the sizes of each shard.
    """

    global_shape: _Ints
    global_offsets: tuple[_Ints, ...]
    local_offsets: tuple[_Ints, ...]
    local_sizes: tuple[_Ints, ...]


def is_checkpointable(value: object) -> bool:
    """Return whether a value is a tensor with all attributes of the protocol."""
    # Checking a protocol is slow. Nearly no tensor has the first attribute, so it is checked first.
    return (
        isinstance(value, torch.Tensor)
        and hasattr(value, "global_shape")
        and isinstance(value, CheckpointableTensor)
    )


def shard_boxes(name: str, value: Any) -> list[tuple[Box, torch.Tensor]]:
    """Return each shard's box of the global tensor, and a view of its memory.

    Args:
        name: the tensor's name, for errors.
        value: a tensor for which `is_checkpointable` is true.

    Raises:
        Conflict: the lists differ in length, or a shard is outside the global or local tensor.
    """
    whole = tuple(value.global_shape)
    lists = (value.global_offsets, value.local_offsets, value.local_sizes)
    if len({len(each) for each in lists}) != 1:
        raise Conflict(
            f"tensor {name!r} lists {len(lists[0])} global offsets, {len(lists[1])} local offsets "
            f"and {len(lists[2])} local sizes: there must be one of each for every shard"
        )
    found = []
    for offsets, local_offsets, sizes in zip(*lists, strict=True):
        if not len(offsets) == len(sizes) == len(whole) or len(local_offsets) != value.dim():
            raise Conflict(
                f"tensor {name!r}: the shard at {tuple(offsets)} has another number of dimensions "
                f"than the global shape {list(whole)} or the local shape {list(value.shape)}"
            )
        box, local = Box(tuple(offsets), tuple(sizes)), Box(tuple(local_offsets), tuple(sizes))
        if not box.within(whole):
            raise Conflict(
                f"tensor {name!r}: the shard {box} is not inside the global shape {list(whole)}"
            )
        if not local.within(tuple(value.shape)):
            raise Conflict(
                f"tensor {name!r}: the shard {local} is not inside the local shape "
                f"{list(value.shape)}"
            )
        found.append((box, value[local.slices]))
    return found
