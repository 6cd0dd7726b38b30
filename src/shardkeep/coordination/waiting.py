"""Reports of long waits: a rank that waits says for whom and why, instead of looking frozen."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic

__all__ = ["LongWait", "report_while_blocked"]

FIRST_REPORT_SECONDS = 10.0
"""How long a rank waits in silence. Ranks that save together rarely come that far apart."""
_GROWTH = 2.0
"""By how much the interval grows with each report, so that a night of waiting is not a full log."""


class LongWait:
    """One wait of this rank, which is reported once it is long, then at growing intervals.

    It has no thread of its own: the waiting thread waits in slices, and reports between two.

    Args:
        report: called with the number of seconds that this rank has been waiting.
    """

    def __init__(self, report: Callable[[float], None]) -> None:
        self._report = report
        self._began = monotonic()
        self._interval = FIRST_REPORT_SECONDS
        self._due = self._began + self._interval

    def slice(self, seconds: float) -> float:
        """Return how long to wait at once: `seconds`, or less if a report is due before."""
        return max(0.0, min(seconds, self._due - monotonic()))

    def report_if_due(self) -> None:
        """Report the wait if it is time to do so."""
        now = monotonic()
        if now >= self._due:
            self._interval *= _GROWTH
            self._due = now + self._interval
            self._report(now - self._began)


@contextmanager
def report_while_blocked(report: Callable[[float], None]) -> Iterator[None]:
    """Report that the block takes long, from a thread: for calls that cannot wait in slices."""
    wait, done = LongWait(report), Event()

    def watch() -> None:
        while not done.wait(wait.slice(sys.maxsize)):
            wait.report_if_due()

    thread = Thread(target=watch, name="shardkeep-waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
