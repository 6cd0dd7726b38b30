"""The job's own store, a `torch.distributed.Store` that the caller provides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from time import monotonic, sleep
from typing import Any

from shardkeep.coordination.keyvalue.clients import client_of
from shardkeep.coordination.keyvalue.contract import KeyValueStore

__all__ = ["TorchKeyValueStore"]

_MISSING = b"shardkeep: no such key"
"""Stands for a value that does not exist. No message begins like this."""
_MIN_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.001, 0.05
_PAUSE_GROWTH = 1.06
"""A wait ends late by a sixteenth of its length at most."""
_MAX_RANKS_AT_FULL_RATE = 256
"""With more ranks, each one looks less often, so that the store's host is not kept busy."""


class TorchKeyValueStore(KeyValueStore):
    """A store of torch, through a client of our own.

    A wait looks at intervals, which grow: a blocking wait would occupy the client.

    Args:
        store: any `torch.distributed.Store`, the same on all ranks, prefixes included.
        size: how many ranks use it in this way.
    """

    def __init__(self, store: Any, size: int) -> None:
        # Kept alive, as the server may end with the last reference: a job can end before its saves.
        self._given = store
        self._client = client_of(store)
        self._max_pause = _MAX_PAUSE_SECONDS * max(1.0, size / _MAX_RANKS_AT_FULL_RATE)

    def set(self, key: str, value: bytes) -> None:
        self._client.call(key, lambda store: store.set(key, value))

    def get(self, key: str) -> bytes:
        value = bytes(self._client.call(key, lambda store: self._read(store, key)))
        # torch waits for the key and then asks for it: the value is empty if the key was removed
        # in between.
        if not value or value == _MISSING:
            raise KeyError(key)
        return value

    def wait(self, keys: Sequence[str], timeout: float) -> str | None:
        end, pause = monotonic() + timeout, _MIN_PAUSE_SECONDS
        while True:
            if (found := self._first(keys)) is not None:
                return found
            left = end - monotonic()
            if left <= 0:
                return None
            sleep(min(pause, left))
            pause = min(pause * _PAUSE_GROWTH, self._max_pause)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._delete(key)

    def _read(self, store: Any, key: str) -> Any:
        if not self._client.is_remote:
            return store.get(key)
        # `get` of a TCPStore is a wait for the key, and then a question. If the host is frozen,
        # both take as long as an answer may. `compare_set` is one question. It changes nothing: it
        # would replace the value by itself, and returns the given one if there is none.
        name = _MISSING.decode()
        return store.compare_set(key, name, name)

    def _first(self, keys: Sequence[str]) -> str | None:
        for at, key in enumerate(keys):
            if self._exists(key):
                # An earlier key may have been set since it was looked for: a message, and after it
                # a failure. The message must be found.
                return next(filter(self._exists, keys[:at]), key)
        return None

    def _exists(self, key: str) -> bool:
        return bool(self._client.call(key, lambda store: store.check([key])))

    def _delete(self, key: str) -> None:
        self._client.call(key, lambda store: store.delete_key(key))
