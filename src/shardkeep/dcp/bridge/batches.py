"""How many items of a load are read together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch.distributed.checkpoint.default_planner as stock
from torch.distributed.checkpoint.planner import LoadPlanner

__all__ = ["batches"]

T = TypeVar("T")

_BATCH = 256 << 20
"""Bytes of tensors that are read at a time: what is cast or moved waits in buffers for that."""


def batches(
    items: Iterable[T], nbytes: Callable[[T], int], planner: LoadPlanner
) -> Iterator[list[T]]:
    """Many at a time, so that reads are few and large; their bytes are given by `nbytes`.

    A planner of the user's own may use one piece of memory for all items, and gets one after the
    other, as in torch.
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
    """Whether it gives and takes the state's own memory, as torch's default planner does."""
    replaced = vars(planner).keys()
    return all(
        name not in replaced
        and getattr(type(planner), name, None) is getattr(stock.DefaultLoadPlanner, name)
        for name in ("resolve_tensor", "commit_tensor", "lookup_tensor", "transform_tensor")
    )
