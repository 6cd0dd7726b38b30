"""A load: by the engine alone, or through a planner and storage of the user's own."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageReader

from shardkeep.checkpoint.reader import open_reader
from shardkeep.coordination import detect_ranks
from shardkeep.dcp.bridge.errors import as_torch
from shardkeep.dcp.bridge.full_state import read_full_state
from shardkeep.dcp.bridge.meta_tensors import allocate_meta_tensors
from shardkeep.dcp.bridge.ranks import members
from shardkeep.dcp.bridge.torch_filesystem import store_of
from shardkeep.dcp.bridge.trust import trusted
from shardkeep.dcp.default_planner import DefaultLoadPlanner, _EmptyStateDictLoadPlanner
from shardkeep.dcp.operations.engine_choice import engine_loads
from shardkeep.dcp.operations.planner_protocol import load_with_planner
from shardkeep.engine import load as engine_load

__all__ = ["load_full_state", "load_state"]

_PLAIN_DICTS = (dict, OrderedDict)


def load_state(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
    *,
    stateful: bool = False,
) -> None:
    """Fill a state by the engine alone, or by torch's protocol where something is customised.

    Parameters are those of torch's `_load_state_dict`.

    Args:
        state_dict: the state, filled in place.
        storage_reader: reads the files.
        process_group: the ranks that take part; by default all.
        coordinator_rank: the rank of the group that combines the plans.
        no_dist: whether this process loads alone.
        planner: plans the load; by default `DefaultLoadPlanner`.
        stateful: whether top-level values may be `Stateful`.

    Raises:
        CheckpointException: the load failed.
    """
    rank, ranks = members(process_group, coordinator_rank, no_dist)
    planner = planner or DefaultLoadPlanner()
    with as_torch(rank):
        if engine_loads(planner, storage_reader):
            _load_with_engine(state_dict, storage_reader, planner, ranks)
            if stateful and type(state_dict) not in _PLAIN_DICTS:
                _set_again(state_dict)
            return
        state: dict[str, Any] = {}

        def template() -> dict[str, Any]:
            if not stateful:
                return state_dict
            for key in sorted(state_dict, key=str):
                value = state_dict[key]
                state[key] = value.state_dict() if isinstance(value, Stateful) else value
            return state

        load_with_planner(
            template, storage_reader, planner, detect_ranks(ranks, by_path=False), rank=rank
        )
        for key, loaded in state.items():
            held = state_dict.get(key)  # Some planners add names to an empty state.
            if isinstance(held, Stateful):
                held.load_state_dict(loaded)
            else:
                state_dict[key] = loaded


def _set_again(state_dict: dict[str, Any]) -> None:
    """Set every entry to the value that it has, as torch does after a load.

    A mapping of the user's own may have a `__setitem__` that does something with the value.
    """
    for key in list(state_dict):
        if not isinstance(state_dict[key], Stateful):
            state_dict[key] = state_dict[key]


def _load_with_engine(state: Any, reader: Any, planner: Any, ranks: Any) -> None:
    """Load with the engine's equivalents of the options of a reader and a planner."""
    allocate_meta_tensors(state)
    report = engine_load.load(
        state,
        store_of(reader),
        strict=not planner.allow_partial_load,
        dtype="cast",
        trust=trusted(),
        ranks=detect_ranks(ranks, by_path=False),
    )
    if isinstance(planner, DefaultLoadPlanner):
        planner.read_from(reader)
    for name, (stored, wanted) in report.cast.items():
        warnings.warn(f"{name}: stored as {stored}, cast to {wanted}", stacklevel=6)


def load_full_state(
    keys: set[str] | None,
    reader: StorageReader,
    process_group: dist.ProcessGroup | None,
) -> dict[str, Any]:
    """Return a checkpoint's state, or a part of it, in full on each rank, without a template.

    Args:
        keys: flat names, or names of containers; by default all. Names that the checkpoint does
            not hold are left out.
        reader: reads the files.
        process_group: the ranks that take part; by default all.

    Raises:
        CheckpointException: the load failed.
    """
    rank, members_ = members(process_group, 0, False)
    planner = _EmptyStateDictLoadPlanner(keys)
    state: dict[str, Any] = {}
    with as_torch(rank):
        ranks = detect_ranks(members_, by_path=False)
        if not engine_loads(None, reader):
            load_with_planner(lambda: state, reader, planner, ranks, rank=rank)
            return state
        store = store_of(reader)
        with ranks.session("load", store.url) as session:
            source = open_reader(store, rank=(session.rank, session.size))
            return dict(read_full_state(source, keys=keys, trust=trusted()))
