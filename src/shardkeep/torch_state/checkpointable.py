"""Plain tensors that say which boxes of a global tensor they hold (torch 2.15's protocol)."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

from shardkeep.errors import Conflict
from shardkeep.types import Box

__all__ = ["CheckpointableTensor", "is_checkpointable", "shard_boxes"]

_Ints = tuple[int, ...]


@runtime_checkable
class CheckpointableTensor(Protocol):
    """What a local tensor says of the global one, as attributes. Lists run over its N shards.

    Attributes:
        global_shape: of the whole tensor.
        global_offsets: N offsets in it.
        local_offsets: N offsets in the local tensor.
        local_sizes: N sizes, of either.
    """

    global_shape: _Ints
    global_offsets: tuple[_Ints, ...]
    local_offsets: tuple[_Ints, ...]
    local_sizes: tuple[_Ints, ...]


def is_checkpointable(value: object) -> bool:
    """Whether it is a tensor with these attributes."""
    # Nearly no tensor has the first one: it is asked first, as asking for a protocol is slow.
    return (
        isinstance(value, torch.Tensor)
        and hasattr(value, "global_shape")
        and isinstance(value, CheckpointableTensor)
    )


def shard_boxes(name: str, value: Any) -> list[tuple[Box, torch.Tensor]]:
    """Each shard's box of the global tensor, and its memory, a view.

    Args:
        name: the tensor's, for errors.
        value: is `is_checkpointable`.

    Raises:
        Conflict: the lists differ in length, or a shard leaves the global or the local tensor.
    """
    whole = tuple(value.global_shape)
    lists = (value.global_offsets, value.local_offsets, value.local_sizes)
    if len({len(each) for each in lists}) != 1:
        raise Conflict(
            f"tensor {name!r} lists {len(lists[0])} global offsets, {len(lists[1])} local offsets "
            f"and {len(lists[2])} local sizes: one of each for every shard"
        )
    found = []
    for offsets, local_offsets, sizes in zip(*lists, strict=True):
        if not len(offsets) == len(sizes) == len(whole) or len(local_offsets) != value.dim():
            raise Conflict(f"tensor {name!r}: a shard at {tuple(offsets)} has other dimensions")
        box, local = Box(tuple(offsets), tuple(sizes)), Box(tuple(local_offsets), tuple(sizes))
        if not box.within(whole):
            raise Conflict(f"tensor {name!r}: shard {box} leaves the global shape {list(whole)}")
        if not local.within(tuple(value.shape)):
            raise Conflict(f"tensor {name!r}: shard {local} leaves the local {list(value.shape)}")
        found.append((box, value[local.slices]))
    return found
