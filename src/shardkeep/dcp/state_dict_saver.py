"""`save` and `async_save`, with torch's signatures."""

from __future__ import annotations

import os
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageWriter
from typing_extensions import deprecated

from shardkeep.coordination import detect_ranks
from shardkeep.dcp.bridge.ranks import members
from shardkeep.dcp.bridge.torch_hooks import hooked
from shardkeep.dcp.bridge.torch_modules import forward_to_torch, torch_module
from shardkeep.dcp.operations import background_process
from shardkeep.dcp.operations.async_staging import (
    choose_stager,
    engine_can_stage,
    has_pending_saves,
    stage_state,
    submit_save,
    wait_for_saves,
    with_pending_failure,
)
from shardkeep.dcp.operations.save import (
    SaveRequest,
    replace_stateful,
    save_from_source,
    save_in_background,
    save_state,
)
from shardkeep.dcp.operations.shared_memory import SharedMemory
from shardkeep.dcp.operations.storage import writer_for

__all__ = ["AsyncCheckpointerType", "AsyncSaveResponse", "async_save", "save", "save_state_dict"]

__getattr__ = forward_to_torch("state_dict_saver")
_save_state_dict = save_state


class _Type(Enum):
    THREAD = "thread"
    PROCESS = "process"


@dataclass
class _Response:
    staging_completion: Future[None]
    upload_completion: Future[Metadata]


_stock = torch_module("state_dict_saver")
# Torch's own, in releases that have them.
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
    """Save a state as a checkpoint that every release of torch from 2.0 on can load.

    A checkpoint at the same place is replaced, as in torch, but in one atomic step: until then the
    old one can be loaded, even if the job is killed at any moment. All ranks that take part call
    this function; each tensor is written by one of the ranks that hold it.

    Args:
        state_dict: nested mappings and lists of tensors and values. A `Stateful` at the top level
            is saved as what its `state_dict()` returns.
        checkpoint_id: a folder or URL; with a writer of your own, whatever it accepts.
        storage_writer: by default one that fits `checkpoint_id`.
        planner: by default `DefaultSavePlanner`.
        process_group: the ranks that take part; by default all. No collective is called on it.
        no_dist: whether this process saves alone.
        use_collectives: False has each rank save what it holds, with metadata of its own.

    Returns:
        Torch's metadata of the checkpoint. It is built when it is first used.

    Raises:
        RuntimeError: neither `checkpoint_id` nor `storage_writer` is given.
        CheckpointException: the save failed on at least one rank, and nothing was committed. It is
            also an instance of the class that `shardkeep.save` raises, such as `Conflict` or
            `AlreadyExists`.

    Example:
        >>> state = {"model": model.state_dict(), "optim": optim.state_dict(), "step": 100}
        >>> dcp.save(state, checkpoint_id="run/step_100")
    """
    state = wait_for_saves(state_dict)  # One of them may write to the same path.
    writer = writer_for(storage_writer, checkpoint_id)
    return save_from_source(
        state, writer, process_group, 0, no_dist, planner, use_collectives, stateful=True
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
    """Copy a state, and save the copy in the background while the caller continues.

    The saves of a process run one after another, in the order of the calls. Changes to the state
    after the return, to tensors as well as to plain objects, are not saved. No collective is
    called, so the process group needs no backend for the CPU.

    Args:
        state_dict: nested mappings and lists of tensors and values. A `Stateful` at the top level
            is saved as what its `state_dict()` returns.
        checkpoint_id: a folder or URL; with a writer of your own, whatever it accepts.
        storage_writer: by default one that fits `checkpoint_id`.
        planner: by default `DefaultSavePlanner`.
        process_group: the ranks that take part; by default all. No collective is called on it.
        async_checkpointer_type: THREAD saves on a thread; PROCESS in another process, which is
            kept between saves and receives the writer and the planner by pickle.
        async_stager: copies the state. By default the writer, if it is an `AsyncStager`; otherwise
            Shardkeep copies it to the CPU.
        no_dist: whether this process saves alone.
        use_collectives: False has each rank save what it holds, with metadata of its own.

    Returns:
        A future of the `Metadata`; its `result()` raises what `save` raises. If the stager returns
        a future, an `AsyncSaveResponse` of two: the state may be changed when `staging_completion`
        is done, and the checkpoint is durable when `upload_completion` is.

    Raises:
        RuntimeError: neither `checkpoint_id` nor `storage_writer` is given.
        Exception: what staging raises. The futures of the other ranks then raise
            `CheckpointException`.

    Example:
        >>> future = dcp.async_save(state, checkpoint_id="run/step_200")
        >>> train_another_step()
        >>> future.result()
    """
    _, ranks = members(process_group, 0, no_dist)
    job = detect_ranks(ranks, by_path=False)
    request = SaveRequest(checkpoint_id, storage_writer, planner, use_collectives)
    stager = choose_stager(async_stager, storage_writer)

    def state() -> dict[str, Any]:
        return replace_stateful(with_pending_failure(state_dict)())

    in_thread = async_checkpointer_type == AsyncCheckpointerType.THREAD
    if (
        in_thread
        and engine_can_stage(stager)
        and request.is_engine_save()
        and not has_pending_saves()
    ):
        return save_in_background(state, request, job)
    save, allocate = partial(request.run, ranks=job), None
    if async_checkpointer_type == AsyncCheckpointerType.PROCESS:
        memory = SharedMemory()
        rendezvous = background_process.rendezvous_of(job, ranks)
        save = partial(
            background_process.save,
            request=request,
            ranks=job,
            rendezvous=rendezvous,
            memory=memory,
        )
        allocate = memory.allocate
    staging, upload = submit_save(
        lambda: stage_state(state(), stager, allocate), save, stager, request.path
    )
    return upload if staging is None else AsyncSaveResponse(staging, upload)


@deprecated("`save_state_dict` is deprecated: use `save`", category=FutureWarning)
def save_state_dict(
    state_dict: dict[str, Any],
    storage_writer: StorageWriter,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: SavePlanner | None = None,
) -> Metadata:
    """Save a state as a checkpoint. Deprecated in torch; use `save`.

    Values that have a `state_dict` of their own are not recognised.

    Args:
        state_dict: nested mappings and lists of tensors and values.
        storage_writer: writes the checkpoint.
        process_group: the ranks that take part; by default all.
        coordinator_rank: the rank of the group that commits.
        no_dist: whether this process saves alone.
        planner: by default `DefaultSavePlanner`.

    Returns:
        Torch's metadata of the checkpoint. It is built when it is first used.

    Raises:
        CheckpointException: the save failed, and nothing was committed.

    Example:
        >>> dcp.save_state_dict(state, dcp.FileSystemWriter("run/step_100"))
    """
    state = wait_for_saves(state_dict)
    storage_writer.reset()
    return save_from_source(
        state, storage_writer, process_group, coordinator_rank, no_dist, planner
    )
