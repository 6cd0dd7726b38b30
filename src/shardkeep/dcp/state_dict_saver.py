"""`save` and `async_save`, with torch's signatures."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageWriter
from typing_extensions import deprecated

from shardkeep.checkpoint import commit
from shardkeep.coordination import detect_ranks
from shardkeep.coordination.contract import Ranks
from shardkeep.dcp.bridge import process_saves
from shardkeep.dcp.bridge.async_staging import (
    after_saves,
    copied_here,
    nothing_put_off,
    owed,
    put_off,
    stage,
    stager_of,
)
from shardkeep.dcp.bridge.engine_choice import plain_save
from shardkeep.dcp.bridge.errors import as_torch
from shardkeep.dcp.bridge.lazy_metadata import committed_save, lazy_metadata
from shardkeep.dcp.bridge.ranks import members
from shardkeep.dcp.bridge.shared_memory import Blocks
from shardkeep.dcp.bridge.steps import save_by_steps
from shardkeep.dcp.bridge.storage import writer_for
from shardkeep.dcp.bridge.torch_filesystem import store_of
from shardkeep.dcp.bridge.torch_hooks import hooked
from shardkeep.dcp.default_planner import DefaultSavePlanner
from shardkeep.dcp.filesystem import CheckpointExists
from shardkeep.dcp.reexports import rest_of, theirs
from shardkeep.engine import async_save as engine_async_save
from shardkeep.engine import save as engine_save
from shardkeep.engine.options import SaveConfig
from shardkeep.engine.save_queue import Behind, Withheld
from shardkeep.errors import AlreadyExists

__all__ = ["AsyncCheckpointerType", "AsyncSaveResponse", "async_save", "save", "save_state_dict"]

__getattr__ = rest_of("state_dict_saver")


class _Type(Enum):
    THREAD = "thread"
    PROCESS = "process"


@dataclass
class _Response:
    staging_completion: Future[None]
    upload_completion: Future[Metadata]


_stock = theirs("state_dict_saver")
# Torch's own where it has them: later releases do.
AsyncCheckpointerType: Any = getattr(_stock, "AsyncCheckpointerType", _Type)
AsyncSaveResponse: Any = getattr(_stock, "AsyncSaveResponse", _Response)


@hooked
def save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Metadata:
    """Save a state; see `shardkeep.save`. Overwrites by default, as torch does, but safely.

    Args:
        state_dict: nested mappings and lists; a `Stateful` at the top level stands for its state.
        checkpoint_id: a folder or URL; for a writer of the user's own, whatever it takes.
        storage_writer: by default one that fits `checkpoint_id`.
        planner: by default `DefaultSavePlanner`.
        process_group: whose ranks take part (by default all); no collective of it is called.
        no_dist: this process saves alone.
        use_collectives: False has each rank save what it holds, with metadata of its own.

    Raises:
        RuntimeError: neither `checkpoint_id` nor `storage_writer` says where to.
        CheckpointException: the save failed, and nothing was committed. It is also of the class
            that `shardkeep.save` raises, and an `Exception`.
    """
    state_dict = after_saves(state_dict)  # One of them may be on its way to the same place.
    writer = writer_for(storage_writer, checkpoint_id)
    return _save_state_dict(
        state_dict, writer, process_group, 0, no_dist, planner, use_collectives, stateful=True
    )


@hooked
def async_save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: Any = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Any:
    """Save a state as it is now, while the caller goes on; otherwise as `save`.

    Saves of one process are done one after another, in the order of the calls. What changes in the
    state after the return, tensors and plain objects alike, does not change what is saved. No
    collective is called, so a group needs no backend for the CPU.

    Args:
        state_dict, checkpoint_id, storage_writer, planner, process_group, no_dist,
            use_collectives: as for `save`.
        async_checkpointer_type: in a thread, or in a process that lives on between saves; it gets
            the writer and the planner by pickle.
        async_stager: copies the state. By default the writer if it is an `AsyncStager`, else
            Shardkeep, to the CPU.

    Returns:
        A future of the `Metadata`, which raises what `save` does. An `AsyncSaveResponse` of that
        and another one where the stager returns a future: the state may change when that is done.

    Raises: what staging raises; the other ranks' futures then raise `CheckpointException`.
    """
    _, ranks = members(process_group, 0, no_dist)
    job = detect_ranks(ranks, by_path=False)
    what = process_saves.Save(checkpoint_id, storage_writer, planner, use_collectives)
    stager = stager_of(async_stager, storage_writer)
    path = str(checkpoint_id or getattr(storage_writer, "path", type(storage_writer).__qualname__))
    in_thread = async_checkpointer_type == AsyncCheckpointerType.THREAD
    if in_thread and copied_here(stager) and what.is_plain() and nothing_put_off():
        return _save_now(lambda: _stateful_to_state_dict(owed(state_dict)), what, job, path)
    save, allocate = partial(_save_put_off, what=what, job=job), None
    if async_checkpointer_type == AsyncCheckpointerType.PROCESS:
        blocks = Blocks()
        where = process_saves.venue(job, ranks)
        save = partial(process_saves.save, what=what, job=job, where=where, blocks=blocks)
        allocate = blocks.take
    staging, upload = put_off(
        lambda: stage(_stateful_to_state_dict(owed(state_dict)), stager, allocate),
        save,
        stager,
        path,
    )
    return upload if staging is None else AsyncSaveResponse(staging, upload)


def _save_now(
    state: Callable[[], Any], what: process_saves.Save, job: Ranks, path: str
) -> Future[Metadata]:
    """Stage and save; if there is no state on this rank, the others hear of that."""
    why = None
    try:
        given = [state()]
    except BaseException as error:
        why = error
        given = [Withheld(why)]
    save = partial(_save_from_arena, given, what, job)
    future = engine_async_save.in_background(save, path)[1]
    if why is not None:
        future.exception()  # It is known.
        raise why
    return future


def _save_from_arena(
    given: list[Any], what: process_saves.Save, job: Ranks, behind: Behind
) -> Metadata:
    """The engine stages what this rank writes, and nothing else, in memory that it keeps."""
    with as_torch(job.rank):
        writer = writer_for(what.storage_writer, what.checkpoint_id)
        planner = what.planner or DefaultSavePlanner()
        return _save_plainly(given, writer, planner, job, behind)


def _save_put_off(state: Any, what: process_saves.Save, job: Ranks) -> Metadata:
    """The save that `async_save` has put off, by then on another thread or in another process."""
    writer = writer_for(what.storage_writer, what.checkpoint_id)
    return _save_state_dict(
        state, writer, job, planner=what.planner, use_collectives=what.use_collectives
    )


@deprecated("`save_state_dict` is deprecated: use `save`", category=FutureWarning)
def save_state_dict(
    state_dict: dict[str, Any],
    storage_writer: StorageWriter,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: SavePlanner | None = None,
) -> Metadata:
    """Save a state. Deprecated in torch; `save` does more."""
    state_dict = after_saves(state_dict)
    storage_writer.reset()
    return _save_state_dict(
        state_dict, storage_writer, process_group, coordinator_rank, no_dist, planner
    )


def _save_state_dict(
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
    """Save by the engine alone, or in steps where something is the user's own."""
    rank, ranks = members(process_group, coordinator_rank, no_dist)
    with as_torch(rank):
        if use_collectives and plain_save(planner, storage_writer):
            job = detect_ranks(ranks, by_path=False)
            return _save_plainly([state_dict], storage_writer, planner or DefaultSavePlanner(), job)
        return save_by_steps(
            lambda: _stateful_to_state_dict(state_dict) if stateful else state_dict,
            storage_writer,
            planner or DefaultSavePlanner(),
            detect_ranks(ranks, by_path=False),
            rank=rank,
            use_collectives=use_collectives,
        )


def _save_plainly(
    given: list[Any],
    writer: Any,
    planner: Any,
    job: Ranks,
    behind: Behind | None = None,
) -> Metadata:
    """What the options of a writer and a planner mean to the engine."""
    store = store_of(writer)
    writer.save_id = commit.new_id()
    options = SaveConfig(
        overwrite=writer.overwrite,
        flatten=planner.flatten_state_dict,
        files=max(1, writer.thread_count),
        balance_replicas=not planner.dedup_save_to_lowest_rank,
        require_identical_objects=False,
        save_id=writer.save_id,
    )
    try:
        engine_save.life(given, store, job, options, behind)
    except AlreadyExists as error:
        what = f"Checkpoint already exists and self.overwrite=False: {error}"
        raise CheckpointExists(what) from error
    return lazy_metadata(committed_save(store, writer.path))


def _stateful_to_state_dict(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.state_dict() if isinstance(value, Stateful) else value
        for key, value in state.items()
    }
