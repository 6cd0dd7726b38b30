"""How a save runs: in the foreground, or in the background while training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from shardkeep.engine.rank_data import RankData
from shardkeep.io.arena import Arena
from shardkeep.types import YieldGil, never_yield
from shardkeep.util import gc_pause

__all__ = ["BackgroundExecution", "Execution", "ForegroundExecution", "Throttle"]

_WORK_SECONDS = 0.001
"""Processor time that a save takes before it pauses: training may have to wait for so long."""

_PAUSE_SECONDS = 0.01
"""Longer than a training step of a small model, so that no step meets two pieces of work."""


class Execution(Protocol):
    """What differs between a save in the foreground and one in the background."""

    asynchronous: bool

    @property
    def yield_gil(self) -> YieldGil:
        """A function to call between pieces of work, which lets other threads run."""
        ...

    def pause_gc(self) -> AbstractContextManager[None]:
        """Return a context for work of this save that creates many objects."""
        ...

    def stage(self, data: RankData, budget: int | None, ranks_here: int) -> bool:
        """Copy the data if this is to be done before it is written; return whether it was."""
        ...

    def release_state(self) -> None:
        """Report that the save does not read the caller's state any more."""
        ...

    def seconds(self) -> float:
        """Return how long ago the caller made the call."""
        ...

    def seconds_blocked(self) -> float:
        """Return for how long the caller has been blocked."""
        ...


class ForegroundExecution(Execution):
    """The caller waits until the checkpoint is committed; its state is written in place."""

    asynchronous = False

    def __init__(self) -> None:
        self._began = time.monotonic()

    @property
    def yield_gil(self) -> YieldGil:
        return never_yield

    def pause_gc(self) -> AbstractContextManager[None]:
        return gc_pause.paused()

    def stage(self, data: RankData, budget: int | None, ranks_here: int) -> bool:
        return False

    def release_state(self) -> None:
        """Do nothing: the caller waits for the whole save."""

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def seconds_blocked(self) -> float:
        return self.seconds()


class BackgroundExecution(Execution):
    """The caller waits until its state is copied; a worker thread does the rest.

    A state that is larger than the memory budget is written in place, and the caller waits until
    its last bytes have been read.

    Args:
        arena: memory to copy the state to.
        has_waiters: whether anyone waits for the save; it does not pause then.
        began: when the caller made the call, by `time.monotonic`.
    """

    asynchronous = True

    def __init__(self, arena: Arena, has_waiters: Callable[[], bool], began: float) -> None:
        self._arena, self._began = arena, began
        self._throttle = Throttle(has_waiters)
        self._released: Future[None] = Future()
        self._seconds_blocked: float | None = None

    @property
    def yield_gil(self) -> YieldGil:
        return self._throttle

    def pause_gc(self) -> AbstractContextManager[None]:
        # The garbage collector is switched off for all threads, and the training loop needs it.
        return nullcontext()

    def stage(self, data: RankData, budget: int | None, ranks_here: int) -> bool:
        staged = data.stage(self._arena, budget, ranks_here)
        if staged:
            self.release_state()
        return staged

    def release_state(self) -> None:
        """Let the caller go on.

        Raises:
            KeyboardInterrupt: the caller was interrupted while it waited, and may have changed the
                state since.
        """
        if self.state_released:
            return  # by an earlier attempt to write
        if not self._released.set_running_or_notify_cancel():
            raise KeyboardInterrupt("the save was interrupted while its state was copied")
        self._seconds_blocked = time.monotonic() - self._began
        self._released.set_result(None)

    @property
    def state_released(self) -> bool:
        """Whether the save does not read the caller's state any more."""
        return self._released.done() and not self._released.cancelled()

    def wait_for_release(self, save: Future[Any]) -> None:
        """Wait until the save does not read the caller's state any more, or has failed.

        If the wait is interrupted, the save fails, because the caller may change the state then.
        """
        try:
            wait([self._released, save], return_when=FIRST_COMPLETED)
        except BaseException:
            self._released.cancel()
            raise

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def seconds_blocked(self) -> float:
        return self.seconds() if self._seconds_blocked is None else self._seconds_blocked


class Throttle:
    """Pauses a background save now and then, so that it does not hold up the training loop.

    After `_WORK_SECONDS` of work, a call of it sleeps for `_PAUSE_SECONDS` and so leaves the
    interpreter lock to other threads. A step of training is then delayed by a piece of the commit,
    not by all of it. It is used on one thread.

    Args:
        has_waiters: whether anyone waits for the save; it does not pause then.
    """

    def __init__(self, has_waiters: Callable[[], bool]) -> None:
        self._has_waiters = has_waiters
        self._since: float | None = None

    def __call__(self) -> None:
        if self._since is None:  # On the thread that it is used on, not the one that made it.
            self._since = time.thread_time()
        if time.thread_time() - self._since > _WORK_SECONDS and not self._has_waiters():
            time.sleep(_PAUSE_SECONDS)
            self._since = time.thread_time()
