"""The drop-in's asynchronous saves: what stages a state, and its place in the line of saves.

The line is the one that `shardkeep.async_save` has, too (`shardkeep.engine.save_queue`): whichever
of the two is called, saves are made in the order in which they were asked for. Here is what only
the drop-in has: stagers that are given, some of which keep their memory for the next save, and
which may give a state that is still being copied.
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

from shardkeep.dcp.reexports import theirs
from shardkeep.engine.save_queue import Job, Withheld, line_of
from shardkeep.torch_state.copies import Allocate, copy_state
from shardkeep.torch_state.devices import pinned
from shardkeep.util.forking import after_fork_in_child

__all__ = ["after_saves", "copied_here", "nothing_put_off", "owed", "put_off", "stage", "stager_of"]

T = TypeVar("T")

_TORCHS = [BlockingAsyncStager.stage, stock.FileSystemWriter.stage]
"""What torch does by default in some release: Shardkeep's own copy promises more."""


def stager_of(given: AsyncStager | None, writer: StorageWriter | None) -> AsyncStager | None:
    """What stages a state: what is given, or a writer that can; None is Shardkeep itself."""
    return writer if given is None and isinstance(writer, AsyncStager) else given


def stage(state: dict[str, Any], stager: Any, allocate: Allocate | None = None) -> Any:
    """A copy of the state that nothing changes any more, or a future of one.

    Args:
        state: with no `Stateful` in it.
        allocate: memory for what Shardkeep copies.

    Raises: whatever the stager raises.
    """
    if _keeps_memory(stager) and stager in _uses:
        wait([_uses[stager]])  # Its memory would be written over.
    if stager is None or _is_torchs(stager):
        if _keeps_memory(stager) and allocate is None:
            allocate = _kept.setdefault(stager, _Kept()).again()
        staged = copy_state(state, allocate=allocate)
    else:
        # Torch's stagers share some objects with the state.
        staged = stager.stage(copy_state(state, keep_tensors=True))
    done = stager is None or isinstance(staged, Future)
    if not done and stager.should_synchronize_after_execute:
        stager.synchronize_staging()
    return staged


def copied_here(stager: Any) -> bool:
    """Whether Shardkeep copies the state, and keeps no memory for a stager."""
    return stager is None or (_is_torchs(stager) and not _keeps_memory(stager))


def nothing_put_off() -> bool:
    """Whether all saves that were put off are done."""
    return not _line.waiting()


def _is_torchs(stager: Any) -> bool:
    return "stage" not in vars(stager) and type(stager).stage in _TORCHS


def _keeps_memory(stager: Any) -> bool:
    default = getattr(theirs("staging"), "DefaultStager", ())
    return isinstance(stager, default) or getattr(stager, "cache_staged_state_dict", False) is True


class _Kept:
    """Memory that is used again by the next copy, as long as tensors have the same sizes."""

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []

    def again(self) -> Allocate:
        before = iter(self._blocks)
        self._blocks = []

        def allocate(nbytes: int) -> torch.Tensor:
            block = next(before, None)
            if block is None or block.numel() != nbytes:
                block = _new(nbytes)
            self._blocks.append(block)
            return block

        return allocate


def _new(nbytes: int) -> torch.Tensor:
    if torch.cuda.is_available():
        return torch.from_numpy(pinned(nbytes))
    return torch.empty(nbytes, dtype=torch.uint8)


_kept: WeakKeyDictionary[Any, _Kept] = WeakKeyDictionary()
"""By the stager that asks for it."""

_uses: WeakKeyDictionary[Any, Future[Any]] = WeakKeyDictionary()
"""By a stager that keeps memory, the last save of what it staged."""

# In a forked process no save of its parent ends, and what is kept may be pinned for the parent.
after_fork_in_child(_uses.clear)

_line = line_of()


def put_off(
    staging: Callable[[], Any], save: Callable[[Any], T], stager: Any, path: str
) -> tuple[Future[None] | None, Future[T]]:
    """Stage now, and save what was staged when all saves are done that were put off before.

    Args:
        staging: gives the state, or a future of it.
        save: saves it.
        stager: what stages, for `stage` to know.
        path: where it saves to.

    Returns:
        When the staging is done, unless it is; and what the save gives or raises. Neither future
        can be cancelled: the other ranks would wait for this one.

    Raises: what `staging` raises; then the save only tells the other ranks so.
    """
    try:
        staged = staging()
    except BaseException as error:
        why = RuntimeError(f"the state was not staged: {type(error).__name__}: {error}")
        why.__cause__ = error
        _line.put(Job(lambda: save(Withheld(why)), owed=False, path=path))
        raise
    job = Job(lambda: save(_had(staged)), owed=True, path=path)
    if _keeps_memory(stager):
        _uses[stager] = job.future
    _line.put(job)
    return _told(staged) if isinstance(staged, Future) else None, job.future


def _had(staged: Any) -> Any:
    try:
        return staged.result() if isinstance(staged, Future) else staged
    except BaseException as error:
        return Withheld(error)


def _told(staged: Future[Any]) -> Future[None]:
    """Done when that is, without the state."""
    told: Future[None] = Future()
    told.set_running_or_notify_cancel()

    def tell(done: Future[Any]) -> None:
        error = CancelledError() if done.cancelled() else done.exception()
        told.set_result(None) if error is None else told.set_exception(error)

    staged.add_done_callback(tell)
    return told


def owed(state: Any) -> Any:
    """The state; if a save failed behind the caller's back, what raises that when it is looked at.

    Raises: nothing, or the other ranks would not hear of it.
    """
    return _line.owed(state)


def after_saves(state: Any) -> Any:
    """The same, once all that was put off is done."""
    _line.finish()
    return owed(state)
