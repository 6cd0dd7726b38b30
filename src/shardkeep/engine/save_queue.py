"""Saves behind the caller's back: one after another, in the order in which they were asked for.

All ranks ask in the same order, so they meet in the same sessions, and two saves to one path never
meet each other. The thread ends when there is nothing left to do. A program that ends waits for
what it has asked for.

What fails is never lost: if nobody has asked for the result by then, the next save raises it
(`Line.owed`), and a program that ends says so.

A process forked meanwhile has none of it: the saves and their threads are its parent's.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as TimedOut  # Python 3.10 has one of its own.
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar
from weakref import WeakSet

from shardkeep.coordination.contract import Ranks
from shardkeep.coordination.keyvalue.timeouts import Timeouts
from shardkeep.errors import AsyncSaveFailed
from shardkeep.io.arena import Arena
from shardkeep.types import YieldGil
from shardkeep.util.forking import after_fork_in_child

__all__ = [
    "Behind",
    "Handle",
    "Job",
    "Line",
    "Outcome",
    "Turns",
    "Withheld",
    "line_of",
    "simulated",
]

_log = logging.getLogger(__name__)

T_co = TypeVar("T_co", covariant=True)

_PIECE = 0.001
"""Seconds of processor time: so much of a thread's work others may have to wait for."""

_REST = 0.01
"""Seconds: more than a step of a small model takes, so that no step meets two pieces."""


@dataclass(frozen=True, slots=True)
class Behind:
    """What a save has that goes on behind its caller's back.

    Attributes:
        arena: memory to stage the state in.
        staged: set as soon as the state is not looked at any more.
        yield_gil: called between pieces of work.
    """

    arena: Arena
    staged: Future[None]
    yield_gil: YieldGil


class Turns:
    """When a thread has had its share, it leaves the interpreter to others for a while.

    So a step of a loop beside a save is held up by a piece of its commit, not by all of it. It is
    called on one thread, between the steps of its work.

    Args:
        hurry: whether somebody waits for the work by now; there is no rest then.
    """

    def __init__(self, hurry: Callable[[], bool]) -> None:
        self._hurry = hurry
        self._since = time.thread_time()

    def __call__(self) -> None:
        if time.thread_time() - self._since > _PIECE and not self._hurry():
            time.sleep(_REST)
            self._since = time.thread_time()


class Handle(Generic[T_co]):
    """A save that goes on in the background."""

    def __init__(self, future: Future[T_co]) -> None:
        self._future = future

    def result(self, timeout: float | None = None) -> T_co:
        """Wait until the checkpoint is durable.

        Args:
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: it is not durable yet; the save goes on.
            ShardkeepError, OSError: why it failed; nothing was committed.
        """
        try:
            return self._future.result(timeout)
        except TimedOut:
            if not self._future.done():
                what = f"the save is not durable after {timeout} s; it goes on"
                raise TimeoutError(what) from None
        return self._future.result()  # Its own error, or it ended just after the time was over.

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future.done()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {'ended' if self.done() else 'under way'}>"


class Outcome(Future[Any]):
    """What work will give.

    Attributes:
        asked: whether anybody has asked, once it was there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = False
        self._here: list[None] = []  # As many as wait: threads need no lock to come and go.

    @property
    def awaited(self) -> bool:
        """Whether anybody waits for it just now; who gave up after some time does not."""
        return bool(self._here)

    @contextmanager
    def waited(self) -> Iterator[None]:
        """Somebody waits for it in the block."""
        self._here.append(None)
        try:
            yield
        finally:
            self._here.pop()

    def result(self, timeout: float | None = None) -> Any:
        with self.waited():
            try:
                return super().result(timeout)
            finally:
                self.asked |= self.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        with self.waited():
            try:
                return super().exception(timeout)
            finally:
                self.asked |= self.done()

    def unasked(self) -> BaseException | None:
        """The error that nobody knows of; asking so does not count."""
        return None if self.asked or not self.done() else super().exception()


class Withheld(dict[str, Any]):
    """In place of a state that can't be saved: who looks at it is told why.

    So a save of it fails as any other: where all other ranks hear of it.
    """

    def __init__(self, why: BaseException) -> None:
        self._why = why

    def _tell(self, *_: Any) -> NoReturn:
        raise self._why

    keys = values = items = get = copy = _tell
    __iter__ = __len__ = __getitem__ = __contains__ = _tell


class Job:
    """Work for later.

    Args:
        work: raises what the future will raise.
        owed: False for what only tells other ranks of a failure that is known here: a program that
            ends does not wait long for it, and nobody needs to be told.
        path: where it saves to.
    """

    def __init__(self, work: Callable[[], Any], owed: bool, path: str) -> None:
        self.work: Callable[[], Any] | None = work
        self.owed, self.path = owed, path
        self.future = Outcome()
        self.future.set_running_or_notify_cancel()

    def run(self) -> None:
        work, self.work = self.work, None
        assert work is not None
        try:
            result = work()
        except BaseException as error:
            if self.owed:  # Nobody may ever ask the future.
                _log.warning("An asynchronous save failed: %s", _in_a_line(error))
            self.future.set_exception(error)
            del self  # Or the error would hold itself, by this frame, and with it what it had open.
        else:
            self.future.set_result(result)


class Line:
    """Jobs, done one after another by a thread that is there while there are any."""

    def __init__(self) -> None:
        self._empty()
        _all_lines.add(self)

    def _empty(self) -> None:
        self._jobs: deque[Job] = deque()
        self._failed: list[Job] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def forget(self) -> None:
        """In a forked process: the jobs are its parent's, and so is the thread that does them."""
        # Kept, as what they hold may end only where its own threads are.
        _of_the_parent.append((self._jobs, self._failed))
        self._empty()

    def put(self, job: Job) -> None:
        with self._lock:
            self._jobs.append(job)
            if self._thread is None:
                # Not one that the interpreter waits for: it would do so too late (`_last`).
                self._thread = threading.Thread(
                    target=self._run, name="shardkeep-save", daemon=True
                )
                self._thread.start()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            job.run()

    def _next(self) -> Job | None:
        with self._lock:
            # A job leaves the line when it is done: it is waited for until then.
            while self._jobs and self._jobs[0].future.done():
                self._leave(self._jobs.popleft())
            if self._jobs:
                return self._jobs[0]
            self._thread = None
            return None

    def _leave(self, job: Job) -> None:
        if job.owed and job.future.unasked() is not None:
            self._failed.append(job)

    def failures(self) -> list[Job]:
        """Those that failed and nobody has asked for; told once."""
        with self._lock:
            while self._jobs and self._jobs[0].future.done():
                self._leave(self._jobs.popleft())
            failed, self._failed = self._failed, []
        return [job for job in failed if not job.future.asked]

    def owed(self, state: Any) -> Any:
        """The state, for the next save; if one before it failed unheard, what raises that instead.

        It is raised where the state is looked at: within that save, so that all ranks hear of it.
        """
        failed = self.failures()
        if not failed:
            return state
        error = failed[0].future.exception()
        assert error is not None
        told = AsyncSaveFailed(failed[0].path, _in_a_line(error))
        told.__cause__ = error
        return Withheld(told)

    def waiting(self) -> list[Job]:
        with self._lock:
            return [] if self._thread is threading.current_thread() else list(self._jobs)

    def finish(self) -> None:
        """Wait until all that is in the line now is done, well or not."""
        _await(self.waiting())


def _await(jobs: Sequence[Job], timeout: float | None = None) -> None:
    with ExitStack() as waits:
        for job in jobs:
            waits.enter_context(job.future.waited())
        wait([job.future for job in jobs], timeout)


def _in_a_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[-1]


_all_lines: WeakSet[Line] = WeakSet()
_of_the_parent: list[Any] = []

_lines: dict[int | None, Line] = {}
_lock = threading.Lock()


def line_of(rank: int | None = None) -> Line:
    """The line of this process, or that of one of the ranks that are simulated in it.

    These must not wait in turn for one another.
    """
    with _lock:
        return _lines.setdefault(rank, Line())


def simulated(ranks: object) -> int | None:
    """Which of several ranks in one process makes a call with `ranks`; None where it has one."""
    return ranks.rank if isinstance(ranks, Ranks) else None


def _last() -> None:
    """The program has come to its end, and threads can still be started."""
    for line in list(_lines.values()):
        while jobs := line.waiting():
            if not any(job.owed for job in jobs):
                _await(jobs, Timeouts.from_settings().silence_seconds)
                break
            _await(jobs[:1])
        for job in line.failures():
            error = job.future.exception()
            assert error is not None
            what = "The program ends, and nobody asked for a failed asynchronous save to %s: %s"
            _log.error(what, job.path, _in_a_line(error))


# Before thread pools refuse to work, where Python has a place for it.
getattr(threading, "_register_atexit", atexit.register)(_last)


def _forget() -> None:
    """In a forked process: it would wait for ever for threads that have stayed in its parent."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()
    for line in list(_all_lines):
        line.forget()


after_fork_in_child(_forget)
