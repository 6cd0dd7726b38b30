"""`load`, with torch's signature."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageReader
from typing_extensions import deprecated

from shardkeep.checkpoint.reader import open_reader
from shardkeep.coordination import detect_ranks
from shardkeep.dcp.bridge.engine_choice import plain_load
from shardkeep.dcp.bridge.errors import as_torch
from shardkeep.dcp.bridge.full_state import read_whole
from shardkeep.dcp.bridge.meta_tensors import allocate_meta_tensors
from shardkeep.dcp.bridge.ranks import members
from shardkeep.dcp.bridge.steps import load_by_steps
from shardkeep.dcp.bridge.storage import reader_for
from shardkeep.dcp.bridge.torch_filesystem import store_of
from shardkeep.dcp.bridge.torch_hooks import hooked
from shardkeep.dcp.bridge.trust import trusted
from shardkeep.dcp.default_planner import DefaultLoadPlanner, _EmptyStateDictLoadPlanner
from shardkeep.dcp.reexports import rest_of
from shardkeep.engine import load as engine_load

__all__ = ["load", "load_state_dict"]

__getattr__ = rest_of("state_dict_loader")

_PLAIN_DICTS = (dict, OrderedDict)


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
            if stateful and type(state_dict) not in _PLAIN_DICTS:
                _set_again(state_dict)
            return
        state: dict[str, Any] = {}

        def template() -> dict[str, Any]:
            if not stateful:
                return state_dict
            for key in sorted(state_dict, key=str):
                state[key] = _state_of(state_dict[key])
            return state

        load_by_steps(
            template, storage_reader, planner, detect_ranks(ranks, by_path=False), rank=rank
        )
        for key, loaded in state.items():
            held = state_dict.get(key)  # Some planners fill a state that is empty.
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


def _load_plainly(state: Any, reader: Any, planner: Any, ranks: Any) -> None:
    """What the options of a reader and a planner mean to the engine."""
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


def _load_state_dict_from_keys(
    keys: set[str] | str | None = None,
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """A checkpoint's state, or part of it, without a template; each rank gets all of it.

    Args:
        keys: flat names, or those of containers around them; by default all. What the checkpoint
            does not hold is left out.
        checkpoint_id, storage_reader, process_group: as for `load`.

    Returns:
        The state, nested as it was saved, on the CPU; read by Shardkeep alone, with its integer
        keys as well.

    Raises: as `load`.
    """
    reader = reader_for(storage_reader, checkpoint_id)
    wanted = {keys} if isinstance(keys, str) else keys
    rank, ranks = members(process_group, 0, False)
    planner = _EmptyStateDictLoadPlanner(wanted)
    state: dict[str, Any] = {}
    with as_torch(rank):
        job = detect_ranks(ranks, by_path=False)
        if not plain_load(None, reader):
            load_by_steps(lambda: state, reader, planner, job, rank=rank)
            return state
        store = store_of(reader)
        with job.session("load", store.url) as session:
            source = open_reader(store, rank=(session.rank, session.size))
            return dict(read_whole(source, keys=wanted, trust=trusted()))


def _state_of(value: Any) -> Any:
    return value.state_dict() if isinstance(value, Stateful) else value
