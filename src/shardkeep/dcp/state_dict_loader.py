"""`load`, with torch's signature."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.logger import _dcp_method_logger
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.planner_helpers import _init_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.checkpoint.utils import _api_bc_check
from typing_extensions import deprecated

from shardkeep import loading
from shardkeep.dcp.bridge.choice import plain_load
from shardkeep.dcp.bridge.errors import as_torch
from shardkeep.dcp.bridge.ranks import members
from shardkeep.dcp.bridge.steps import load_by_steps
from shardkeep.dcp.bridge.storage import reader_for
from shardkeep.dcp.bridge.streams import store_of
from shardkeep.dcp.bridge.trust import trusted
from shardkeep.dcp.default_planner import DefaultLoadPlanner
from shardkeep.dcp.handed import rest_of
from shardkeep.ranks import take_part

__all__ = ["load", "load_state_dict"]

__getattr__ = rest_of("state_dict_loader")


@_dcp_method_logger(log_exceptions=True)
@_api_bc_check
def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> None:
    """Fill a state in place; see `shardkeep.load`. Other dtypes are cast, with a warning.

    Args:
        state_dict: the template; a `Stateful` at the top level is given its state.
        checkpoint_id: a folder or URL; for a reader of the user's own, whatever it takes.
        storage_reader: by default one that fits `checkpoint_id`.
        planner: by default `DefaultLoadPlanner`.
        process_group: whose ranks take part (by default all); no collective of it is called.
        no_dist: this process loads alone.

    Raises:
        RuntimeError: neither `checkpoint_id` nor `storage_reader` says where from.
        CheckpointException: the load failed. It is also of the class that `shardkeep.load` raises
            (`Untrusted`: one line of its message trusts the class), and an `Exception`.
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
    """Fill a state. Deprecated in torch; `load` does more."""
    storage_reader.reset()
    _load_state_dict(state_dict, storage_reader, process_group, coordinator_rank, no_dist, planner)


def _load_state_dict(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
    *,
    stateful: bool = False,
) -> None:
    """Load by the engine alone, or in steps where something is the user's own."""
    rank, ranks = members(process_group, coordinator_rank, no_dist)
    planner = planner or DefaultLoadPlanner()
    with as_torch(rank):
        if plain_load(planner, storage_reader):
            _load_plainly(state_dict, storage_reader, planner, ranks)
            return
        state = {key: _state_of(state_dict[key]) for key in sorted(state_dict)}
        load_by_steps(state if stateful else state_dict, storage_reader, planner, take_part(ranks))
        for key in state if stateful else ():
            if isinstance(state_dict[key], Stateful):
                state_dict[key].load_state_dict(state[key])
            else:
                state_dict[key] = state[key]


def _load_plainly(state: Any, reader: Any, planner: Any, ranks: Any) -> None:
    """What the options of a reader and a planner mean to the engine."""
    _init_state_dict(state)  # Tensors on the meta device get memory.
    report = loading.load(
        state,
        store_of(reader),
        strict=not planner.allow_partial_load,
        dtype="cast",
        trust=trusted(),
        ranks=ranks,
    )
    for name, (stored, wanted) in report.cast.items():
        warnings.warn(f"{name}: stored as {stored}, cast to {wanted}", stacklevel=6)


def _state_of(value: Any) -> Any:
    return value.state_dict() if isinstance(value, Stateful) else value
