"""Sharding by hand: the parts of a tensor that this rank holds, without DTensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardkeep.errors import Conflict
from shardkeep.types import Box

__all__ = ["Shards"]


@dataclass(frozen=True, eq=False)
class Shards:
    """The parts of a global tensor that this rank holds, for tensors that are sharded by hand.

    Put it into a state in place of a tensor. Every rank that has the tensor in its state passes the
    same global shape. A load fills the tensors of the parts in place.

    Args:
        shape: the shape of the global tensor.
        parts: pairs of the position of a part and its tensor. A position is the part's offsets in
            the global tensor, or its `Box`. May be empty.
        dtype: the dtype of the tensor. Needed only if there is no part.

    Raises:
        Conflict: a part is not inside the shape, or the dtypes differ, or there is none.

    Example:
        >>> rows = torch.ones(2, 4)
        >>> state = {"table": shardkeep.Shards((8, 4), [((2, 0), rows)])}  # rows 2 and 3 of 8
        >>> shardkeep.save(state, "run/step_100")
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[Box, torch.Tensor], ...]
    dtype: torch.dtype

    def __init__(
        self,
        shape: Sequence[int],
        parts: Sequence[tuple[Box | Sequence[int], torch.Tensor]],
        dtype: torch.dtype | None = None,
    ) -> None:
        made = tuple((_box(position, tensor), tensor) for position, tensor in parts)
        dtype = made[0][1].dtype if dtype is None and made else dtype
        if dtype is None:
            raise Conflict("Shards without a part need a dtype: pass dtype=, the same on all ranks")
        sizes = tuple(int(size) for size in shape)
        for box, tensor in made:
            if not box.within(sizes) or tuple(tensor.shape) != box.sizes:
                raise Conflict(
                    f"a part of shape {tuple(tensor.shape)} at {box} is not inside the global "
                    f"shape {sizes} of the Shards"
                )
            if tensor.dtype != dtype:
                raise Conflict(
                    f"the part at {box} has the dtype {tensor.dtype}, but the Shards have {dtype}"
                )
        values: dict[str, Any] = {"shape": sizes, "parts": made, "dtype": dtype}
        for field, value in values.items():
            object.__setattr__(self, field, value)


def _box(position: Box | Sequence[int], tensor: torch.Tensor) -> Box:
    if isinstance(position, Box):
        return position
    offsets = tuple(int(offset) for offset in position)
    if len(offsets) != tensor.ndim:
        raise Conflict(
            f"the offsets {offsets} of a part must be one number for each of its {tensor.ndim} "
            "dimensions"
        )
    return Box(offsets, tuple(tensor.shape))
