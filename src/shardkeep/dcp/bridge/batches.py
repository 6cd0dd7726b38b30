"""Batches of items that are loaded together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch.distributed.checkpoint.default_planner as stock
from torch.distributed.checkpoint.planner import LoadPlanner

__all__ = ["batches"]

T = TypeVar("T")

_BATCH = 256 << 20
"""Size limit of a batch. Tensors that are cast or moved need buffers until it is complete."""


def batches(
    items: Iterable[T], nbytes: Callable[[T], int], planner: LoadPlanner
) -> Iterator[list[T]]:
    """Yield the items in large batches, so that few large reads are needed.

    A planner with methods of its own may use the same memory for all items, so it gets one item at
    a time, as in torch.

    Args:
        items: the items of a plan.
        nbytes: returns the number of bytes of an item.
        planner: the planner that provides memory for the items.
    """
    together = _BATCH if _gives_own_memory(planner) else 0
    batch: list[T] = []
    size = 0
    for item in items:
        if batch and size + nbytes(item) > together:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += nbytes(item)
    if batch:
        yield batch


def _gives_own_memory(planner: LoadPlanner) -> bool:
    """Return whether a planner provides the state's own memory, as torch's default planner does."""
    replaced = vars(planner).keys()
    return all(
        name not in replaced
        and getattr(type(planner), name, None) is getattr(stock.DefaultLoadPlanner, name)
        for name in ("resolve_tensor", "commit_tensor", "lookup_tensor", "transform_tensor")
    )
