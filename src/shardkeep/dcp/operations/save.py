"""A save: by the engine alone, or through a planner and storage of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
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
from shardkeep.engine.execution import BackgroundExecution, ForegroundExecution
from shardkeep.engine.options import SaveConfig
from shardkeep.engine.save_queue import StateSource, raising
from shardkeep.errors import AlreadyExists
from shardkeep.stores.contract import Store

__all__ = [
    "SaveRequest",
    "replace_stateful",
    "save_from_source",
    "save_in_background",
    "save_state",
]


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

    def run(self, state: StateSource, ranks: Ranks) -> Metadata:
        """Save a state that was staged before, on whatever thread or in whatever process."""
        return save_from_source(
            state,
            writer_for(self.storage_writer, self.checkpoint_id),
            ranks,
            planner=self.planner,
            use_collectives=self.use_collectives,
        )


def save_state(state_dict: dict[str, Any], *args: Any, **options: Any) -> Metadata:
    """Save a state; see `save_from_source` for the other arguments."""
    return save_from_source(lambda: state_dict, *args, **options)


def save_from_source(
    state: StateSource,
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
        state: gives the state.
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
            return _save_with_engine(state, storage_writer, planner, ranks)
        return save_with_planner(
            lambda: replace_stateful(state()) if stateful else state(),
            storage_writer,
            planner,
            ranks,
            rank=rank,
            use_collectives=use_collectives,
        )


def save_in_background(state: StateSource, request: SaveRequest, ranks: Ranks) -> Future[Metadata]:
    """Stage what this rank writes, in memory of the engine's, and save it in the background.

    Args:
        state: returns the state. If it raises, the other ranks' saves fail with this cause.
        request: what to save with.
        ranks: the ranks that save.

    Raises: what `state` raises.
    """
    source, failure = state, None
    try:
        source = _constant(state())
    except BaseException as error:
        source, failure = raising(error), error
    prepare = partial(_prepare, source, request, ranks)
    execution, future = engine_async_save.begin_in_background(prepare, request.path)
    if failure is not None:
        future.exception()  # Marks it as seen: the caller gets the failure itself.
        raise failure
    execution.wait_for_release(future)
    return future


def _constant(state: Any) -> StateSource:
    return lambda: state


def _prepare(
    state: StateSource, request: SaveRequest, ranks: Ranks, execution: BackgroundExecution
) -> Callable[[], Metadata]:
    """Let the engine copy what this rank writes, and return the rest of the save."""
    with as_torch(ranks.rank):
        writer: Any = writer_for(request.storage_writer, request.checkpoint_id)
        store, config = _engine_options(writer, request.planner or DefaultSavePlanner())
        with _as_checkpoint_exists():
            complete = engine_async_save.prepare(state, store, ranks, config, execution)

    def finish() -> Metadata:
        with as_torch(ranks.rank):
            complete()
            return lazy_metadata(committed_save(store, writer.path))

    return finish


def _save_with_engine(state: StateSource, writer: Any, planner: Any, ranks: Ranks) -> Metadata:
    """Save with the engine's equivalents of the options of a writer and a planner."""
    store, config = _engine_options(writer, planner)
    with _as_checkpoint_exists():
        engine_save.run_save(state, store, ranks, config, ForegroundExecution())
    return lazy_metadata(committed_save(store, writer.path))


def _engine_options(writer: Any, planner: Any) -> tuple[Store, SaveConfig]:
    """Return the engine's equivalents of the options of a writer and a planner."""
    writer.save_id = commit.new_id()
    return store_of(writer), SaveConfig(
        overwrite=writer.overwrite,
        flatten=planner.flatten_state_dict,
        files=max(1, writer.thread_count),
        balance_replicas=not planner.dedup_save_to_lowest_rank,
        require_identical_objects=False,
        save_id=writer.save_id,
    )


@contextmanager
def _as_checkpoint_exists() -> Iterator[None]:
    """Raise torch's exception where there is a checkpoint already."""
    try:
        yield
    except AlreadyExists as error:
        raise CheckpointExists(f"{CHECKPOINT_EXISTS}: {error}") from error


def replace_stateful(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with the `state_dict()` of each `Stateful` at the top level in its place."""
    return {
        key: value.state_dict() if isinstance(value, Stateful) else value
        for key, value in state.items()
    }
