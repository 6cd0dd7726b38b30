"""A thread that makes calls in the order in which they were submitted."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

__all__ = ["Worker"]


class Worker:
    """One daemon thread, started by the first call and kept until the worker is no longer used.

    It is not a `ThreadPoolExecutor`, because Python waits without limit for the threads of an
    executor before a program ends. The program must not wait so for a save that only reports a
    failure to other ranks.

    Args:
        name: name of the thread.
        set_up: called on the thread before the first call.
    """

    def __init__(self, name: str, set_up: Callable[[], None] = lambda: None) -> None:
        self._name, self._set_up = name, set_up
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[[], None]) -> None:
        """Make a call on the thread, after those submitted before. It must not raise."""
        self._calls.put(call)
        with self._lock:
            if self._thread is None:
                # Without a reference to this object, or it would never be freed.
                self._thread = threading.Thread(
                    target=_run, args=(self._calls, self._set_up), name=self._name, daemon=True
                )
                self._thread.start()
                weakref.finalize(self, self._calls.put, None).atexit = False

    def is_current_thread(self) -> bool:
        """Return whether the caller runs on this worker's thread."""
        return self._thread is threading.current_thread()


def _run(calls: SimpleQueue[Callable[[], None] | None], set_up: Callable[[], None]) -> None:
    set_up()
    while (call := calls.get()) is not None:
        call()
        del call  # or the objects that it refers to would live until the next call
