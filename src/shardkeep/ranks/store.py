"""Through the job's own store: a `torch.distributed.Store`, given from outside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from threading import Lock
from time import monotonic, sleep
from typing import Any
from weakref import WeakKeyDictionary

from shardkeep.ranks.keys import KeyValue

__all__ = ["StoreKeys"]

_SHORTEST, _LONGEST = 0.001, 0.05
_CROWD = 256
"""Ranks beyond which each one looks less often, so that the store's host is not kept busy."""
_TIMEOUT = timedelta(seconds=10)
"""For calls that never wait on purpose."""


class StoreKeys(KeyValue):
    """An own client of a store, so that calls of others that wait do not hold up ours.

    Waiting is looking again and again, ever more slowly: a blocking wait would hold the client.

    Args:
        store: any `torch.distributed.Store`; wrapped in prefixes or not, but alike on all ranks.
        size: how many ranks use it like this.
    """

    def __init__(self, store: Any, size: int) -> None:
        self._given = store  # Its server may live as long as this: a job can end before its saves.
        self._store = _own_client(store)
        self._longest = _LONGEST * max(1.0, size / _CROWD)

    def set(self, key: str, value: bytes) -> None:
        with _translated(key):
            self._store.set(key, value)

    def get(self, key: str) -> bytes:
        with _translated(key):
            value = bytes(self._store.get(key))
        # TCPStore waits for a key and then asks for it; one that goes in between comes back empty.
        if not value:
            raise KeyError(key)
        return value

    def wait(self, keys: Sequence[str], timeout: float) -> str | None:
        end, pause = monotonic() + timeout, _SHORTEST
        while True:
            for key in keys:
                with _translated(key):
                    if self._store.check([key]):
                        return key
            left = end - monotonic()
            if left <= 0:
                return None
            sleep(min(pause, left))
            pause = min(pause * 1.5, self._longest)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with _translated(key):
                self._store.delete_key(key)


@contextmanager
def _translated(key: str) -> Iterator[None]:
    """torch raises RuntimeErrors: a key that is missing by now ends in a timeout."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip()
        if "timeout" in text.lower():
            raise KeyError(key) from error
        raise ConnectionError(text.splitlines()[0] if text else repr(error)) from error


_clients: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""Store -> our client of it, for as long as the job keeps the store. With a new one for each save,
torch would look up the name of the address each time: 5 s where no one answers that."""
_connecting = Lock()


def _own_client(store: Any) -> Any:
    with _connecting:
        own = _clients.get(store)
        if own is None:
            own = _connect(store)
            if own is not store:
                _clients[store] = own
    return own


def _connect(store: Any) -> Any:
    try:
        own = store.clone()
    except (AttributeError, RuntimeError):  # torch up to 2.7, or a kind that cannot
        own = _second_client(store)
    if own is not store:
        own.set_timeout(_TIMEOUT)
    return own


def _second_client(store: Any) -> Any:
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if not (hasattr(store, "host") and hasattr(store, "port")):
        return store  # a store in files or in memory has no client that others could hold
    return type(store)(
        store.host, store.port, is_master=False, timeout=_TIMEOUT, wait_for_workers=False
    )
