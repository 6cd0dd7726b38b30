"""The queue of background saves of this process.

All ranks make their saves in the same order, one at a time, so they meet in the same sessions and
two saves to one path never overlap. The queue has one persistent worker thread for each priority.

No failure is lost: if nobody has requested the result of a failed save by then, the next save
raises it (`SaveQueue.guard`), and a program that ends logs it. A program that ends waits for its
saves.

A forked process starts with an empty queue: the saves and their threads are its parent's.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from contextlib import ExitStack, suppress
from typing import Any, NoReturn
from weakref import WeakSet

from shardkeep.coordination.contract import Ranks
from shardkeep.coordination.keyvalue.timeouts import Timeouts
from shardkeep.engine.handles import SaveFuture
from shardkeep.errors import AsyncSaveFailed
from shardkeep.util.forking import after_fork_in_child
from shardkeep.util.worker import Worker

__all__ = ["Preparation", "SaveQueue", "StateSource", "queue_key", "queue_of", "raising"]

_log = logging.getLogger(__name__)

StateSource = Callable[[], Any]
"""Returns the state to save, or raises the reason why there is none.

It is called inside the session of a save, so that all ranks learn of the reason.
"""

Preparation = Callable[[], Callable[[], Any]]
"""Copies the state of a save, and returns the rest of the work."""

_LOWEST_PRIORITY = 19


class _Entry:
    """One save in the queue.

    Args:
        path: where it is saved to.
        future: gets its result or error.
        report_failure: False for a save that only tells other ranks of a failure that is known
            here. The next save does not raise its failure, and a program that ends does not wait
            long for it.
        logs_failure: whether the queue logs its failure. The engine's own saves do so themselves.
        low_priority: whether it runs on the worker with the lowest priority.
    """

    def __init__(
        self,
        path: str,
        future: SaveFuture,
        *,
        report_failure: bool = True,
        logs_failure: bool = False,
        low_priority: bool = False,
    ) -> None:
        self.path, self.future = path, future
        self.report_failure, self.logs_failure = report_failure, logs_failure
        self.low_priority = low_priority
        self.previous: SaveFuture | None = None

    def unreported_error(self) -> BaseException | None:
        """Return the error that the next save has to raise."""
        error = self.future.unreported_error() if self.report_failure else None
        # The caller knows of an interrupt.
        return None if isinstance(error, KeyboardInterrupt) else error


class SaveQueue:
    """Saves that are made one after another by worker threads."""

    def __init__(self) -> None:
        self._reset()
        _all_queues.add(self)

    def _reset(self) -> None:
        self._entries: list[_Entry] = []
        self._failed: list[_Entry] = []
        self._lock = threading.Lock()
        self._workers = {
            False: Worker("shardkeep-save"),
            True: Worker("shardkeep-save-low-priority", _lower_priority),
        }

    def forget(self) -> None:
        """Start anew in a forked process."""
        # Kept, because what they hold may only be released where its own threads are.
        _of_the_parent.append((self._entries, self._failed, self._workers))
        self._reset()

    def submit(
        self, work: Callable[[], Any], path: str, *, report_failure: bool = True
    ) -> SaveFuture:
        """Do some work after all saves that are in the queue now.

        Args:
            work: its result or error becomes that of the returned future.
            path: where it saves to.
            report_failure: False if nobody has to learn of its failure.
        """
        entry = _Entry(
            path, SaveFuture(), report_failure=report_failure, logs_failure=report_failure
        )
        with self._lock:
            self._append(entry)
        self._start(entry, work)
        return entry.future

    def begin(
        self, prepare: Preparation, path: str, *, future: SaveFuture, low_priority: bool = False
    ) -> None:
        """Prepare a save on this thread, after all others, and let a worker do the rest.

        Args:
            prepare: copies the state, and returns the rest of the work.
            path: where it saves to.
            future: gets the result of the rest, or the error of either.
            low_priority: do the rest with the lowest scheduling priority.

        Raises:
            BaseException: `prepare` was interrupted by something that is not an `Exception`.
        """
        entry = _Entry(path, future, low_priority=low_priority)
        try:
            self._wait_for_turn(entry)
            rest, error = _attempt(prepare)
            if rest is not None:
                self._start(entry, rest)
            else:
                future.set_exception(error)
        except BaseException as interrupt:
            if not future.done():  # or all later saves would wait for it
                future.set_exception(interrupt)
            raise

    def wait(self) -> None:
        """Wait until all saves that are in the queue now have ended, successfully or not."""
        _wait_for(self.unfinished())

    def unfinished(self) -> list[_Entry]:
        """Return the saves that have not ended; none of them to a callback of a save."""
        with self._lock:
            return [] if self._on_worker() else self._running()

    def guard(self, state: StateSource) -> StateSource:
        """Return the source of the state for the next save.

        If an earlier save failed and its error was not reported, the source raises it: within the
        next save, so that all ranks learn of it.
        """
        failed = self.take_failures()
        if not failed:
            return state
        error = failed[0].future.exception()
        assert error is not None
        failure = AsyncSaveFailed(failed[0].path, _last_line(error))
        failure.__cause__ = error
        return raising(failure)

    def take_failures(self) -> list[_Entry]:
        """Return the failed saves whose result nobody has requested; each of them only once."""
        with self._lock:
            self._running()
            failed, self._failed = self._failed, []
        return [entry for entry in failed if not entry.future.requested]

    def _wait_for_turn(self, entry: _Entry) -> None:
        while True:
            self.wait()
            with self._lock:
                if self._on_worker() or not self._running():
                    self._append(entry)
                    return
            # Another thread was faster.

    def _append(self, entry: _Entry) -> None:
        running = self._running()
        entry.previous = running[-1].future if running else None
        self._entries.append(entry)

    def _running(self) -> list[_Entry]:
        """Drop the entries that have ended, and return the others."""
        ended = [entry for entry in self._entries if entry.future.done()]
        self._failed += [entry for entry in ended if entry.unreported_error() is not None]
        self._entries = [entry for entry in self._entries if not entry.future.done()]
        return list(self._entries)

    def _on_worker(self) -> bool:
        return any(worker.is_current_thread() for worker in self._workers.values())

    def _start(self, entry: _Entry, work: Callable[[], Any]) -> None:
        self._workers[entry.low_priority].submit(_Run(entry, work))


class _Run:
    """A call that does the work of an entry; it keeps nothing of it afterwards."""

    def __init__(self, entry: _Entry, work: Callable[[], Any]) -> None:
        self._entry = entry
        self._work: Callable[[], Any] | None = work

    def __call__(self) -> None:
        entry, work, self._work = self._entry, self._work, None
        assert work is not None
        if entry.previous is not None:  # which may be on the other worker
            wait([entry.previous])
            entry.previous = None
        try:
            result = work()
        except BaseException as error:
            if entry.logs_failure:  # Nobody may ever request the result.
                _log.warning("An asynchronous save failed: %s", _last_line(error))
            entry.future.set_exception(error)
            # Or the error would hold itself, by this frame, and with it all files it had open.
            del self, entry, work
        else:
            entry.future.set_result(result)


def _attempt(
    prepare: Preparation,
) -> tuple[Callable[[], Any], None] | tuple[None, Exception]:
    try:
        return prepare(), None
    except Exception as error:
        return None, error


def _wait_for(entries: Sequence[_Entry], timeout: float | None = None) -> None:
    with ExitStack() as waits:
        for entry in entries:
            waits.enter_context(entry.future.waiting())
        wait([entry.future for entry in entries], timeout)


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[-1]


def _lower_priority() -> None:
    """Give this thread, and those that it starts, the lowest priority, where threads have one.

    Elsewhere than on Linux, the number of a thread may be that of some other process.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)


def raising(error: BaseException) -> StateSource:
    """Return a source of a state that raises an error."""

    def fail() -> NoReturn:
        raise error

    return fail


_all_queues: WeakSet[SaveQueue] = WeakSet()
_of_the_parent: list[Any] = []

_queues: dict[int | None, SaveQueue] = {}
_lock = threading.Lock()


def queue_of(key: int | None = None) -> SaveQueue:
    """Return the queue of this process, or that of one of the ranks that are simulated in it.

    Simulated ranks have a queue each, because they wait for one another.
    """
    with _lock:
        return _queues.setdefault(key, SaveQueue())


def queue_key(ranks: object) -> int | None:
    """Return which queue a call with `ranks` uses: None unless ranks are simulated."""
    return ranks.rank if isinstance(ranks, Ranks) else None


def _finish_at_exit() -> None:
    """Wait for all saves as the program ends, while threads can still be started."""
    for queue in list(_queues.values()):
        while entries := queue.unfinished():
            if not any(entry.report_failure for entry in entries):
                _wait_for(entries, Timeouts.from_settings().silence_seconds)
                break
            _wait_for(entries[:1])
        for entry in queue.take_failures():
            error = entry.future.exception()
            assert error is not None
            _log.error(
                "The program ends, and nobody requested the result of a failed asynchronous save "
                "to %s: %s",
                entry.path,
                _last_line(error),
            )


# Before thread pools refuse to work, where Python has a hook for it.
getattr(threading, "_register_atexit", atexit.register)(_finish_at_exit)


def _forget() -> None:
    """Start anew in a forked process, which would wait for ever for threads of its parent."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()
    for queue in list(_all_queues):
        queue.forget()


after_fork_in_child(_forget)
