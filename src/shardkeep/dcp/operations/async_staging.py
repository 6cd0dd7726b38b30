"""Staging for the drop-in's asynchronous saves, and their place in the queue of saves.

The queue is the one that `shardkeep.async_save` uses (`shardkeep.engine.save_queue`): whichever of
the two functions is called, saves run in the order of the calls. This module has what only the
drop-in needs: stagers of the caller's, some of which reuse their memory for the next save, and some
of which return a state that is still being copied.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError, Future, wait
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed.checkpoint.filesystem as stock
from torch.distributed.checkpoint.staging import AsyncStager, BlockingAsyncStager
from torch.distributed.checkpoint.storage import StorageWriter

from shardkeep.dcp.bridge.torch_modules import torch_module
from shardkeep.engine.save_queue import StateSource, queue_of, raising
from shardkeep.torch_state.copies import Allocate, copy_state
from shardkeep.torch_state.devices import pinned
from shardkeep.util.forking import after_fork_in_child

__all__ = [
    "choose_stager",
    "engine_can_stage",
    "has_pending_saves",
    "stage_state",
    "submit_save",
    "wait_for_saves",
    "with_pending_failure",
]

T = TypeVar("T")

_TORCH_STAGE_METHODS = [BlockingAsyncStager.stage, stock.FileSystemWriter.stage]
"""Torch's defaults in some release. Shardkeep copies the state instead: it copies objects, too."""


def choose_stager(given: AsyncStager | None, writer: StorageWriter | None) -> AsyncStager | None:
    """Return the stager to use: the given one, else a writer that can stage, else None.

    None means that Shardkeep copies the state.
    """
    return writer if given is None and isinstance(writer, AsyncStager) else given


def stage_state(state: dict[str, Any], stager: Any, allocate: Allocate | None = None) -> Any:
    """Return a copy of the state that later changes do not affect, or a future of one.

    Args:
        state: without any `Stateful`.
        stager: copies it; None for Shardkeep.
        allocate: returns memory for what Shardkeep copies.

    Raises: what the stager raises.
    """
    if _reuses_memory(stager) and stager in _last_saves:
        wait([_last_saves[stager]])  # The stager would overwrite what that save still reads.
    if stager is None or _is_torch_default(stager):
        if _reuses_memory(stager) and allocate is None:
            allocate = _memory_of.setdefault(stager, _ReusedMemory()).allocator()
        staged = copy_state(state, allocate=allocate)
    else:
        # Torch's stagers share some objects with the state.
        staged = stager.stage(copy_state(state, keep_tensors=True))
    is_complete = stager is None or isinstance(staged, Future)
    if not is_complete and stager.should_synchronize_after_execute:
        stager.synchronize_staging()
    return staged


def engine_can_stage(stager: Any) -> bool:
    """Return whether the engine may stage the state in its own memory, in place of this stager."""
    return stager is None or (_is_torch_default(stager) and not _reuses_memory(stager))


def has_pending_saves() -> bool:
    """Return whether a save that was submitted before has not ended."""
    return bool(_queue.unfinished())


def _is_torch_default(stager: Any) -> bool:
    return "stage" not in vars(stager) and type(stager).stage in _TORCH_STAGE_METHODS


def _reuses_memory(stager: Any) -> bool:
    default = getattr(torch_module("staging"), "DefaultStager", ())
    return isinstance(stager, default) or getattr(stager, "cache_staged_state_dict", False) is True


class _ReusedMemory:
    """Memory that the next copy of a state uses again where its tensors have the same sizes."""

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []

    def allocator(self) -> Allocate:
        """Return a function that allocates the memory of one copy."""
        previous = iter(self._blocks)
        self._blocks = []

        def allocate(nbytes: int) -> torch.Tensor:
            block = next(previous, None)
            if block is None or block.numel() != nbytes:
                block = _new_block(nbytes)
            self._blocks.append(block)
            return block

        return allocate


def _new_block(nbytes: int) -> torch.Tensor:
    if torch.cuda.is_available():
        return torch.from_numpy(pinned(nbytes))
    return torch.empty(nbytes, dtype=torch.uint8)


_memory_of: WeakKeyDictionary[Any, _ReusedMemory] = WeakKeyDictionary()
"""Stager -> the memory that is reused for it."""

_last_saves: WeakKeyDictionary[Any, Future[Any]] = WeakKeyDictionary()
"""Stager that reuses memory -> the last save of what it staged."""

# In a forked process, saves of the parent never end, and the parent's memory may be pinned.
after_fork_in_child(_last_saves.clear)

_queue = queue_of()


def submit_save(
    staging: Callable[[], Any], save: Callable[[StateSource], T], stager: Any, path: str
) -> tuple[Future[None] | None, Future[T]]:
    """Stage a state now, and queue its save behind all saves that were submitted before.

    Args:
        staging: returns the staged state, or a future of it.
        save: saves the state that a source gives.
        stager: the stager that `staging` uses.
        path: where the save goes, for messages.

    Returns:
        A future of the staging, or None if it is complete; and a future of the save. Neither can
        be cancelled: the other ranks would wait for this one.

    Raises: what `staging` raises. The save is queued nevertheless, so that the other ranks fail
        with this cause instead of waiting.
    """
    try:
        staged = staging()
    except BaseException as error:
        failure = RuntimeError(f"the state was not staged: {type(error).__name__}: {error}")
        failure.__cause__ = error
        _queue.submit(lambda: save(raising(failure)), path, report_failure=False)
        raise
    source = staged.result if isinstance(staged, Future) else lambda: staged
    future = _queue.submit(lambda: save(source), path)
    if _reuses_memory(stager):
        _last_saves[stager] = future
    return _completion_of(staged) if isinstance(staged, Future) else None, future


def _completion_of(staged: Future[Any]) -> Future[None]:
    """Return a future that is done when `staged` is, and does not keep the state alive."""
    completion: Future[None] = Future()
    completion.set_running_or_notify_cancel()

    def complete(done: Future[Any]) -> None:
        error = CancelledError() if done.cancelled() else done.exception()
        completion.set_result(None) if error is None else completion.set_exception(error)

    staged.add_done_callback(complete)
    return completion


def with_pending_failure(state: Any) -> StateSource:
    """Return a source of the state, which raises the failure of an earlier background save instead.

    The failure is not raised here: all ranks have to enter the save for it to reach them.
    """
    return _queue.guard(lambda: state)


def wait_for_saves(state: Any) -> StateSource:
    """Wait for all submitted saves, then return what `with_pending_failure` returns."""
    _queue.wait()
    return with_pending_failure(state)
