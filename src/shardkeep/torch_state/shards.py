"""Sharding by hand: what this rank holds of a tensor, without DTensor."""

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
    """Boxes of a tensor of that global shape, in this rank's memory.

    Put it into a state in place of a tensor: `Shards((8, 4), [((2, 0), rows_2_to_4)])`. Every rank
    that knows the tensor gives the same shape; a load fills the tensors in place.

    Args:
        shape: global shape, in elements.
        parts: pairs of where a part starts (its offsets, or a `Box`) and its tensor.
        dtype: of the tensor; may be left out where there is a part.

    Raises:
        Conflict: a part reaches out of the shape, or the dtype is not known or not the same.
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
        made = tuple((_box(place, tensor), tensor) for place, tensor in parts)
        dtype = made[0][1].dtype if dtype is None and made else dtype
        if dtype is None:
            raise Conflict("Shards without a part must say their dtype")
        sizes = tuple(int(size) for size in shape)
        for box, tensor in made:
            if not box.within(sizes) or tuple(tensor.shape) != box.sizes:
                raise Conflict(
                    f"a part of shape {tuple(tensor.shape)} does not fit at {box} into {sizes}"
                )
            if tensor.dtype != dtype:
                raise Conflict(f"a part at {box} is {tensor.dtype}, not {dtype}")
        values: dict[str, Any] = {"shape": sizes, "parts": made, "dtype": dtype}
        for field, value in values.items():
            object.__setattr__(self, field, value)


def _box(place: Box | Sequence[int], tensor: torch.Tensor) -> Box:
    if isinstance(place, Box):
        return place
    offsets = tuple(int(offset) for offset in place)
    if len(offsets) != tensor.ndim:
        raise Conflict(f"offsets {offsets} of a part that has {tensor.ndim} dimensions")
    return Box(offsets, tuple(tensor.shape))
