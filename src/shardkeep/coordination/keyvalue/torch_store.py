"""Through the job's own store: a `torch.distributed.Store`, given from outside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from time import monotonic, sleep
from typing import Any

from shardkeep.coordination.keyvalue.clients import client_of
from shardkeep.coordination.keyvalue.contract import KeyValueStore

__all__ = ["TorchKeyValueStore"]

_MISSING = b"shardkeep: no such key"
"""Given in place of a value; no message begins like this."""
_SHORTEST, _LONGEST = 0.001, 0.05
_CROWD = 256
"""Ranks beyond which each one looks less often, so that the store's host is not kept busy."""


class TorchKeyValueStore(KeyValueStore):
    """An own client of a store, so that calls of others that wait do not hold up ours.

    Waiting is looking again and again, ever more slowly: a blocking wait would hold the client.

    Args:
        store: any `torch.distributed.Store`; wrapped in prefixes or not, but alike on all ranks.
        size: how many ranks use it like this.
    """

    def __init__(self, store: Any, size: int) -> None:
        self._given = store  # Its server may live as long as this: a job can end before its saves.
        self._client = client_of(store)
        self._longest = _LONGEST * max(1.0, size / _CROWD)

    def set(self, key: str, value: bytes) -> None:
        self._client.call(key, lambda store: store.set(key, value))

    def get(self, key: str) -> bytes:
        value = bytes(self._client.call(key, lambda store: self._value(store, key)))
        # A store that waits for a key and then asks for it gives nothing if it goes in between.
        if not value or value == _MISSING:
            raise KeyError(key)
        return value

    def wait(self, keys: Sequence[str], timeout: float) -> str | None:
        end, pause = monotonic() + timeout, _SHORTEST
        while True:
            if (found := self._first(keys)) is not None:
                return found
            left = end - monotonic()
            if left <= 0:
                return None
            sleep(min(pause, left))
            pause = min(pause * 1.06, self._longest)  # late by a sixteenth of the wait at most

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._delete(key)

    def _value(self, store: Any, key: str) -> Any:
        if not self._client.remote:
            return store.get(key)
        # TCPStore's `get` is a wait for the key, and then a question. If its host is frozen, the
        # wait and its end take as long as an answer may. This is one question. It sets nothing: it
        # would put a value in its own place, and gives it where there is none.
        name = _MISSING.decode()
        return store.compare_set(key, name, name)

    def _first(self, keys: Sequence[str]) -> str | None:
        for at, key in enumerate(keys):
            if self._has(key):
                # One before it may have come meanwhile: a message, and then a failure.
                return next(filter(self._has, keys[:at]), key)
        return None

    def _has(self, key: str) -> bool:
        return bool(self._client.call(key, lambda store: store.check([key])))

    def _delete(self, key: str) -> None:
        self._client.call(key, lambda store: store.delete_key(key))
