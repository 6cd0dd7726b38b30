"""`load`, with torch's signature."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from typing_extensions import deprecated

from shardkeep.dcp.bridge.torch_hooks import hooked
from shardkeep.dcp.bridge.torch_modules import forward_to_torch
from shardkeep.dcp.operations.load import load_full_state, load_state
from shardkeep.dcp.operations.storage import reader_for

__all__ = ["load", "load_state_dict"]

__getattr__ = forward_to_torch("state_dict_loader")
_load_state_dict = load_state


@hooked
def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> None:
    """Fill a state in place from a checkpoint, resharding where its layout differs.

    Only the bytes that this rank needs are read, and each is checked against its checksum. Nothing
    in the checkpoint is executed. A tensor that is stored in another dtype is cast, with a warning.
    All ranks that take part call this function with the same names.

    Args:
        state_dict: the template, a nested state. Tensors are filled in place. A `Stateful` at the
            top level is given its state by `load_state_dict`.
        checkpoint_id: a folder or URL; with a reader of your own, whatever it accepts.
        storage_reader: by default one that fits `checkpoint_id`.
        planner: by default `DefaultLoadPlanner`.
        process_group: the ranks that take part; by default all. No collective is called on it.
        no_dist: whether this process loads alone.

    Raises:
        RuntimeError: neither `checkpoint_id` nor `storage_reader` is given.
        CheckpointException: the load failed. It is also an instance of the class that
            `shardkeep.load` raises: `Mismatch` if names or shapes differ, `Damaged` if bytes are
            missing or differ from what was saved, `NotACheckpoint` if nothing is committed there,
            `Untrusted` if an object needs a class that you do not trust (its message says how to
            trust it).

    Example:
        >>> state = {"model": model.state_dict(), "step": 0}
        >>> dcp.load(state, checkpoint_id="run/step_100")
        >>> model.load_state_dict(state["model"])
    """
    reader = reader_for(storage_reader, checkpoint_id)
    _load_state_dict(state_dict, reader, process_group, 0, no_dist, planner, stateful=True)


@deprecated("`load_state_dict` is deprecated: use `load`", category=FutureWarning)
def load_state_dict(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
) -> None:
    """Fill a state in place from a checkpoint. Deprecated in torch; use `load`.

    Values that have a `state_dict` of their own are not recognised.

    Args:
        state_dict: the template, a nested state; tensors are filled in place.
        storage_reader: reads the checkpoint.
        process_group: the ranks that take part; by default all.
        coordinator_rank: the rank of the group that combines the plans.
        no_dist: whether this process loads alone.
        planner: by default `DefaultLoadPlanner`.

    Raises:
        CheckpointException: the load failed.

    Example:
        >>> dcp.load_state_dict(state, dcp.FileSystemReader("run/step_100"))
    """
    storage_reader.reset()
    _load_state_dict(state_dict, storage_reader, process_group, coordinator_rank, no_dist, planner)


def _load_state_dict_from_keys(
    keys: set[str] | str | None = None,
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Return a checkpoint's state, or a part of it, without a template; each rank gets all of it.

    Args:
        keys: flat names, or names of containers; by default all. Names that the checkpoint does
            not hold are left out.
        checkpoint_id: a folder or URL; with a reader of your own, whatever it accepts.
        storage_reader: by default one that fits `checkpoint_id`.
        process_group: the ranks that take part; by default all.

    Returns:
        The state, nested as it was saved, on the CPU. If Shardkeep's own reader reads it, integer
        keys are integers again.

    Raises:
        RuntimeError: neither `checkpoint_id` nor `storage_reader` is given.
        CheckpointException: the load failed.
    """
    reader = reader_for(storage_reader, checkpoint_id)
    return load_full_state({keys} if isinstance(keys, str) else keys, reader, process_group)
