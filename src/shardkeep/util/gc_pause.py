"""Pauses of Python's cyclic garbage collector while many objects are created at once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from shardkeep.util.forking import after_fork_in_child

__all__ = ["paused"]


class _PauseCount:
    """Counts the pauses of all threads: the first one stops the collector, the last one starts it.

    Without the count, a second pause would find the collector off, and leave it off after the first
    one has turned it on. Or it could turn it off for good, between the check and the action of the
    first one.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._depth = 0
        self._was_enabled = False

    def begin(self) -> None:
        """Count one more pause, and turn the collector off if it is the first."""
        with self._lock:
            if not self._depth:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._depth += 1

    def end(self) -> None:
        """Count one pause less, and turn the collector on again after the last."""
        with self._lock:
            self._depth -= 1
            if not self._depth and self._was_enabled:
                gc.enable()

    def forget(self) -> None:
        """Turn the collector on again in a forked process, which lacks the threads that paused."""
        if self._depth and self._was_enabled:
            gc.enable()


_pauses = _PauseCount()


@contextmanager
def paused() -> Iterator[None]:
    """Pause the garbage collector of the process inside the block.

    Each collection would examine all new objects again, and find them in use. With a few objects
    for each of 100,000 tensors, that takes longer than the work itself.

    Don't wait for other ranks inside the block: the collector is off for all threads.
    """
    pauses = _pauses
    pauses.begin()
    try:
        yield
    finally:
        pauses.end()


def _forget() -> None:
    """Start anew in a forked process: the pauses belong to threads of its parent."""
    global _pauses  # noqa: PLW0603
    _pauses.forget()
    _pauses = _PauseCount()


after_fork_in_child(_forget)
