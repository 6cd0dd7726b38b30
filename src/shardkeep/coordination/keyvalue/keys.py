"""What a session asks of the job's key-value store, and one such store in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from threading import Event, Lock
from time import monotonic
from typing import Protocol

__all__ = ["KeyValue", "MemoryKeys"]


class KeyValue(Protocol):
    """A key-value store that all ranks share. Linearizable: what one rank set before another key,
    every rank finds before that other key.

    Used by several threads at once (sessions and their heartbeats); no call may hold up another
    one for longer than a message takes. Raises `ConnectionError` once the store is out of reach.
    """

    def set(self, key: str, value: bytes) -> None:
        """Set or replace."""
        ...

    def get(self, key: str) -> bytes:
        """The value of a key that exists, never an empty one; KeyError if it has gone."""
        ...

    def wait(self, keys: Sequence[str], timeout: float) -> str | None:
        """The first of the keys that exists, as soon as one does; None after `timeout` seconds."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove keys; one that is already gone is no error."""
        ...


class MemoryKeys(KeyValue):
    """For ranks that are threads of one process. A waiter is woken by its own keys only."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._values: dict[str, bytes] = {}
        self._waiting: dict[str, set[Event]] = {}

    def set(self, key: str, value: bytes) -> None:
        with self._lock:
            self._values[key] = value
            for waiter in self._waiting.get(key, ()):
                waiter.set()

    def get(self, key: str) -> bytes:
        with self._lock:
            return self._values[key]

    def wait(self, keys: Sequence[str], timeout: float) -> str | None:
        woken, end = Event(), monotonic() + timeout
        with self._lock:
            if (found := self._first(keys)) is not None or timeout <= 0:
                return found
            for key in keys:
                self._waiting.setdefault(key, set()).add(woken)
        try:
            while True:
                woken.wait(max(0.0, end - monotonic()))
                woken.clear()
                with self._lock:
                    if (found := self._first(keys)) is not None or monotonic() >= end:
                        return found
        finally:
            with self._lock:
                for key in keys:
                    waiters = self._waiting[key]
                    waiters.discard(woken)
                    if not waiters:
                        del self._waiting[key]

    def delete(self, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                self._values.pop(key, None)

    def __len__(self) -> int:
        return len(self._values)

    def _first(self, keys: Sequence[str]) -> str | None:
        return next((key for key in keys if key in self._values), None)
