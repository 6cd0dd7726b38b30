"""A save: by the engine alone, or through a planner and storage of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageWriter

from shardkeep.checkpoint import commit
from shardkeep.coordination import detect_ranks
from shardkeep.coordination.contract import Ranks
from shardkeep.dcp.bridge.errors import as_torch
from shardkeep.dcp.bridge.lazy_metadata import committed_save, lazy_metadata
from shardkeep.dcp.bridge.ranks import members
from shardkeep.dcp.bridge.torch_filesystem import store_of
from shardkeep.dcp.bridge.torch_messages import CHECKPOINT_EXISTS
from shardkeep.dcp.default_planner import DefaultSavePlanner
from shardkeep.dcp.filesystem import CheckpointExists
from shardkeep.dcp.operations.engine_choice import engine_saves
from shardkeep.dcp.operations.planner_protocol import save_with_planner
from shardkeep.dcp.operations.storage import writer_for
from shardkeep.engine import async_save as engine_async_save
from shardkeep.engine import save as engine_save
from shardkeep.engine.options import SaveConfig
from shardkeep.engine.save_queue import Behind, Withheld
from shardkeep.errors import AlreadyExists

__all__ = ["SaveRequest", "replace_stateful", "save_in_background", "save_state"]


@dataclass(frozen=True)
class SaveRequest:
    """The arguments of an `async_save`; can be pickled if the writer and the planner can."""

    checkpoint_id: Any
    storage_writer: Any
    planner: Any
    use_collectives: bool

    @property
    def name(self) -> str:
        """The name by which all ranks know this save."""
        named = self.checkpoint_id or getattr(self.storage_writer, "checkpoint_id", None)
        return str(named or type(self.storage_writer).__qualname__)

    @property
    def path(self) -> str:
        """Where the save goes, for messages."""
        writer = self.storage_writer
        return str(self.checkpoint_id or getattr(writer, "path", type(writer).__qualname__))

    def is_engine_save(self) -> bool:
        """Return whether the engine can do the save alone, since nothing is customised."""
        writer = self.storage_writer or writer_for(None, self.checkpoint_id)
        return self.use_collectives and engine_saves(self.planner, writer)

    def run(self, state: Any, ranks: Ranks) -> Metadata:
        """Save a state that was staged before, on whatever thread or in whatever process."""
        return save_state(
            state,
            writer_for(self.storage_writer, self.checkpoint_id),
            ranks,
            planner=self.planner,
            use_collectives=self.use_collectives,
        )


def save_state(
    state_dict: dict[str, Any],
    storage_writer: StorageWriter,
    process_group: dist.ProcessGroup | Ranks | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: SavePlanner | None = None,
    use_collectives: bool = True,
    *,
    stateful: bool = False,
) -> Metadata:
    """Save a state by the engine alone, or by torch's protocol where something is customised.

    Parameters are those of torch's `_save_state_dict`.

    Args:
        state_dict: the state.
        storage_writer: writes the files.
        process_group: the ranks that take part; by default all.
        coordinator_rank: the rank of the group that commits.
        no_dist: whether this process saves alone.
        planner: plans the save; by default `DefaultSavePlanner`.
        use_collectives: False has each rank commit what it holds.
        stateful: whether top-level values may be `Stateful`.

    Raises:
        CheckpointException: the save failed, and nothing was committed.
    """
    rank, members_ = members(process_group, coordinator_rank, no_dist)
    planner = planner or DefaultSavePlanner()
    with as_torch(rank):
        ranks = detect_ranks(members_, by_path=False)
        if use_collectives and engine_saves(planner, storage_writer):
            return _save_with_engine([state_dict], storage_writer, planner, ranks)
        return save_with_planner(
            lambda: replace_stateful(state_dict) if stateful else state_dict,
            storage_writer,
            planner,
            ranks,
            rank=rank,
            use_collectives=use_collectives,
        )


def save_in_background(
    state: Callable[[], Any], request: SaveRequest, ranks: Ranks
) -> Future[Metadata]:
    """Stage what this rank writes, in memory of the engine's, and save it in the background.

    Args:
        state: returns the state. If it raises, the other ranks' saves fail with this cause.
        request: what to save with.
        ranks: the ranks that save.

    Raises: what `state` raises.
    """
    failure = None
    try:
        states = [state()]
    except BaseException as error:
        failure = error
        states = [Withheld(error)]
    save = partial(_save_from_arena, states, request, ranks)
    future = engine_async_save.in_background(save, request.path)[1]
    if failure is not None:
        future.exception()  # Marks it as seen: the caller gets the failure itself.
        raise failure
    return future


def _save_from_arena(
    states: list[Any], request: SaveRequest, ranks: Ranks, background: Behind
) -> Metadata:
    with as_torch(ranks.rank):
        writer = writer_for(request.storage_writer, request.checkpoint_id)
        planner = request.planner or DefaultSavePlanner()
        return _save_with_engine(states, writer, planner, ranks, background)


def _save_with_engine(
    states: list[Any],
    writer: Any,
    planner: Any,
    ranks: Ranks,
    background: Behind | None = None,
) -> Metadata:
    """Save with the engine's equivalents of the options of a writer and a planner.

    Args:
        states: the state alone. The engine takes it out of the list, so that nothing here keeps
            its tensors alive while files are written.
        writer, planner: where to, and how.
        ranks: the ranks that save.
        background: the context of a save in the background.
    """
    store = store_of(writer)
    writer.save_id = commit.new_id()
    config = SaveConfig(
        overwrite=writer.overwrite,
        flatten=planner.flatten_state_dict,
        files=max(1, writer.thread_count),
        balance_replicas=not planner.dedup_save_to_lowest_rank,
        require_identical_objects=False,
        save_id=writer.save_id,
    )
    try:
        engine_save.life(states, store, ranks, config, background)
    except AlreadyExists as error:
        raise CheckpointExists(f"{CHECKPOINT_EXISTS}: {error}") from error
    return lazy_metadata(committed_save(store, writer.path))


def replace_stateful(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with the `state_dict()` of each `Stateful` at the top level in its place."""
    return {
        key: value.state_dict() if isinstance(value, Stateful) else value
        for key, value in state.items()
    }
