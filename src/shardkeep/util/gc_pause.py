"""Python's cyclic garbage collector, out of the way while many values are made at once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from shardkeep.util.forking import after_fork_in_child

__all__ = ["paused"]


class _Pauses:
    """Those of all threads: the first one stops the collector, the last one lets it go on.

    Each for itself, the second would find it off, and leave it so after the first has turned it on;
    or turn it off for good, between the question of the first and its act.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._depth = 0
        self._was = False

    def begin(self) -> None:
        with self._lock:
            if not self._depth:
                self._was = gc.isenabled()
                gc.disable()
            self._depth += 1

    def end(self) -> None:
        with self._lock:
            self._depth -= 1
            if not self._depth and self._was:
                gc.enable()

    def forget(self) -> None:
        """The threads of the pauses are not there any more."""
        if self._depth and self._was:
            gc.enable()


_pauses = _Pauses()


@contextmanager
def paused() -> Iterator[None]:
    """No collections inside: each one goes through all values again, and finds them in use.

    With some values for each of 100,000 tensors, they would take longer than the work itself.
    """
    pauses = _pauses
    pauses.begin()
    try:
        yield
    finally:
        pauses.end()


def _forget() -> None:
    """In a forked process: the pauses are those of its parent's threads."""
    global _pauses  # noqa: PLW0603
    _pauses.forget()
    _pauses = _Pauses()


after_fork_in_child(_forget)
