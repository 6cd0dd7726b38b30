"""Handles of saves in the background, and the futures behind them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # Python 3.10 has its own class.
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Generic, TypeVar

from typing_extensions import Self

from shardkeep.engine.reports import SaveReport

__all__ = ["Handle", "SaveFuture", "SaveHandle"]

T_co = TypeVar("T_co", covariant=True)


class SaveFuture(Future[Any]):
    """The result of a save in the background.

    It counts the threads that wait for it, and knows whether anyone has requested the result. It
    can't be cancelled, because the other ranks would wait for this one.

    Attributes:
        requested: whether the result was requested after the save had ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requested = False
        self._waiting_threads = 0
        self._count_lock = threading.Lock()
        self.set_running_or_notify_cancel()

    @property
    def has_waiters(self) -> bool:
        """Whether a thread waits for it now. A wait that timed out does not count."""
        return self._waiting_threads > 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the caller as a waiter inside the block."""
        with self._count_lock:
            self._waiting_threads += 1
        try:
            yield
        finally:
            with self._count_lock:
                self._waiting_threads -= 1

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the result and return it, or raise the error of the save."""
        with self.waiting():
            try:
                return super().result(timeout)
            finally:
                self.requested |= self.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end of the save and return its error, or None."""
        with self.waiting():
            try:
                return super().exception(timeout)
            finally:
                self.requested |= self.done()

    def unreported_error(self) -> BaseException | None:
        """Return the error of a save that has ended if nobody has requested the result."""
        return None if self.requested or not self.done() else super().exception()


class Handle(Generic[T_co]):
    """A save that goes on in the background. It can be awaited, but not cancelled."""

    def __init__(self, future: Future[T_co]) -> None:
        self._future = future

    def result(self, timeout: float | None = None) -> T_co:
        """Wait until the checkpoint is durable, and return the report of the save.

        Args:
            timeout: the number of seconds to wait at most; None waits without limit.

        Raises:
            TimeoutError: the checkpoint is not durable yet. The save goes on.
            ShardkeepError, OSError: the save failed, and nothing was committed.
        """
        try:
            return self._future.result(timeout)
        except FutureTimeoutError:
            if not self._future.done():
                raise TimeoutError(_not_durable(timeout)) from None
        return self._future.result()  # The save's own error, or it ended just after the timeout.

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait until the save has ended, and return its error; None if it succeeded.

        The error then counts as reported: the next save does not raise it.

        Args:
            timeout: the number of seconds to wait at most; None waits without limit.

        Raises:
            TimeoutError: the save has not ended yet. It goes on.
        """
        try:
            return self._future.exception(timeout)
        except FutureTimeoutError:
            if not self._future.done():
                raise TimeoutError(_not_durable(timeout)) from None
        return self._future.exception()

    def done(self) -> bool:
        """Return whether the save has ended, successfully or not."""
        return self._future.done()

    def add_done_callback(self, callback: Callable[[Self], object]) -> None:
        """Call a function with this handle when the save has ended.

        It is called on the thread that saved, or at once if the save has ended already. An
        exception of the callback is logged and ignored. A failed save counts as reported only if
        the callback calls `result` or `exception`; otherwise the next save raises the error.

        Args:
            callback: a function of one argument, this handle.

        Example:
            >>> handle.add_done_callback(lambda handle: print(handle.result()))
        """
        self._future.add_done_callback(lambda _: callback(self))

    def __await__(self) -> Generator[Any, None, T_co]:
        return self._wait().__await__()

    async def _wait(self) -> T_co:
        waiting = self._future.waiting() if isinstance(self._future, SaveFuture) else nullcontext()
        with waiting, suppress(Exception):  # `result` raises it.
            await asyncio.wrap_future(self._future)
        return self.result()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._status()}>"

    def _status(self) -> str:
        if not self.done():
            return "running"
        error = self._peek_error()
        if error is not None:
            return f"failed, {type(error).__name__}: {error}"
        return f"done, {Future.result(self._future)!r}"

    def _peek_error(self) -> BaseException | None:
        """Return the error of a save that has ended, without counting it as reported."""
        return Future.exception(self._future)


class SaveHandle(Handle[SaveReport]):
    """A save that goes on in the background, as `async_save` returns it.

    It can be awaited (`report = await handle`). It can't be cancelled, because the other ranks
    would wait for this one; cancelling a task that awaits it leaves the save alone.

    Example:
        >>> handle = shardkeep.async_save(state, "run/step_100")
        >>> handle.done()
        False
        >>> print(handle.result())
        saved 1.9 GiB in 0.93 s, this rank 1.9 GiB (2.2 GB/s): plan 0.02, stage 0.25, ...
    """


def _not_durable(timeout: float | None) -> str:
    return f"the save is not durable after {timeout} s; it goes on"
