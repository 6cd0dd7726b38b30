"""A key-value store in the memory of one process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from threading import Event, Lock
from time import monotonic

from shardkeep.coordination.keyvalue.contract import KeyValueStore

__all__ = ["MemoryKeyValueStore"]


class MemoryKeyValueStore(KeyValueStore):
    """A key-value store for ranks that are threads of one process.

    A waiting thread is woken only for the keys that it waits for. `len()` is the number of keys.
    """

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

    def names(self) -> list[str]:
        """Return the keys, in the order in which they were set first."""
        with self._lock:
            return list(self._values)

    def _first(self, keys: Sequence[str]) -> str | None:
        return next((key for key in keys if key in self._values), None)
