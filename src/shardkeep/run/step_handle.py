"""The handle of a save that a manager makes."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from shardkeep.engine.handles import Handle

if TYPE_CHECKING:
    from shardkeep.engine.reports import SaveReport

__all__ = ["StepHandle"]


class StepHandle(Handle["SaveReport | None"]):
    """A save of a `Manager`. Its `result` is None if the save was skipped.

    Attributes:
        step: the step that is saved.
        skipped: whether the save was left out because the previous one was still under way.

    Example:
        >>> handle = run.save(step, state)
        >>> report = handle.result()
    """

    def __init__(self, step: int, future: Future[SaveReport | None], skipped: bool = False) -> None:
        super().__init__(future)
        self.step, self.skipped = step, skipped
        self._reported = False

    @staticmethod
    def skipping(step: int) -> StepHandle:
        """Return the handle of a save that was left out."""
        future: Future[SaveReport | None] = Future()
        future.set_result(None)
        return StepHandle(step, future, skipped=True)

    @staticmethod
    def failing(step: int, error: Exception) -> StepHandle:
        """Return the handle of a save that failed before it began."""
        future: Future[SaveReport | None] = Future()
        future.set_exception(error)
        return StepHandle(step, future)

    def result(self, timeout: float | None = None) -> SaveReport | None:
        """Wait until the step is durable, and return the report of the save; None if skipped.

        Args:
            timeout: the number of seconds to wait at most; None waits without limit.

        Raises:
            TimeoutError: the step is not durable yet. The save goes on.
            ShardkeepError, OSError: the save failed, and nothing was committed.
        """
        try:
            return super().result(timeout)
        finally:
            self._reported = self.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait until the save has ended, and return its error; None if it succeeded.

        The error then counts as reported: the next save does not raise it.

        Args:
            timeout: the number of seconds to wait at most; None waits without limit.

        Raises:
            TimeoutError: the save has not ended yet. It goes on.
        """
        try:
            return super().exception(timeout)
        finally:
            self._reported = self.done()

    def unreported_error(self) -> BaseException | None:
        """Wait until the save has ended, and return its error if the caller does not know of it.

        Asking for it does not make it known: see `mark_reported`.
        """
        error = self._future.exception()
        return None if self._reported else error

    def mark_reported(self) -> None:
        """Note that the error of the save has been raised, or that the caller has been warned."""
        self._reported = True

    def __repr__(self) -> str:
        return f"<StepHandle: step {self.step}, {self._state()}>"

    def _state(self) -> str:
        if self.skipped:
            return "skipped"
        if not self._future.done():
            return "in progress"
        error = self._future.exception()
        return "saved" if error is None else f"failed with {type(error).__name__}"
