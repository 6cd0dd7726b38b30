"""Own clients of the job's store, which give up on a host that does not answer any more."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Lock
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from shardkeep.coordination.keyvalue.timeouts import Timeouts

__all__ = ["Client", "client_of"]

T = TypeVar("T")

_LEAST = 7.0
"""Seconds that the host of the store may take for an answer in any case: a client that connects can
make it look up a name, for 5 s where no one answers that, and all others wait."""


class Client:
    """A client of a `torch.distributed.Store` whose calls fail in the ways of `KeyValueStore`.

    Attributes:
        store: the client itself.
        remote: whether another process answers: it is a TCPStore's.
        lost: why the store is out of reach for good; None if it is not.
    """

    def __init__(self, store: Any, patience: float) -> None:
        self.store, self._patience = store, patience
        self.remote = _is_remote(_server(store))
        self.lost: str | None = None
        self._lock = Lock()

    def call(self, key: str, act: Callable[[Any], T]) -> T:
        """What `act` gives for the store.

        Raises:
            KeyError: `key` is missing by now.
            ConnectionError: the store is out of reach.
        """
        # One at a time, as in the store itself: or each thread would wait as long, in turn.
        with self._lock:
            return self._call(key, act)

    def _call(self, key: str, act: Callable[[Any], T]) -> T:
        if self.lost is not None:
            raise ConnectionError(self.lost)
        try:
            return act(self.store)
        except RuntimeError as error:  # what torch raises for everything
            text = str(error).strip()
            if "Socket Timeout" in text:
                # An answer that comes after all would be taken for that to the next question.
                self.lost = f"no answer for {self._patience:g} s"
                raise ConnectionError(self.lost) from error
            if "timeout" in text.lower():
                raise KeyError(key) from error
            raise ConnectionError(text.splitlines()[0] if text else repr(error)) from error


_clients: WeakKeyDictionary[Any, Client] = WeakKeyDictionary()
"""Store -> our client of it, for as long as the job keeps the store. With a new one for each save,
torch would look up the name of the address each time: 5 s where no one answers that."""
_connecting = Lock()


def client_of(store: Any) -> Client:
    """Our client, so that calls of others that wait do not hold up ours."""
    with _connecting:
        client = _clients.get(store)
        if client is None or client.lost is not None:
            client = _connect(store)
            if client.store is not store:
                _clients[store] = client
    return client


def _connect(store: Any) -> Client:
    patience = max(_LEAST, Timeouts.from_settings().silence_seconds)
    server = _server(store)
    with _giving_up(patience, getattr(server, "port", None)):
        try:
            own = store.clone()
        except (AttributeError, RuntimeError):  # torch up to 2.7, or a kind that cannot
            own = _second_client(server, timedelta(seconds=patience)) or store
    if own is not store:
        own.set_timeout(timedelta(seconds=patience))
    return Client(own, patience)


def _server(store: Any) -> Any:
    """The store itself, without the prefixes that it is wrapped in."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store


def _is_remote(server: Any) -> bool:
    return hasattr(server, "host") and hasattr(server, "port")


def _second_client(server: Any, timeout: timedelta) -> Any:
    if not _is_remote(server):
        return None  # a store in files or in memory has no client that others could hold
    return type(server)(
        server.host, server.port, is_master=False, timeout=timeout, wait_for_workers=False
    )


@contextmanager
def _giving_up(seconds: float, port: int | None) -> Iterator[None]:
    """A client that is made in the block waits so long for each answer, and not for ever.

    The process that hosts the store may be frozen: its connections live on. torch has no timeout
    for a single answer (seen in 2.13), but its sockets obey that of the system.
    """
    before = _connections(port)
    yield
    limit = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    for descriptor in _connections(port) - before:
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def _connections(port: int | None) -> set[int]:
    """Descriptors of this process's connections to a port, where the system lists them."""
    found = set()
    with suppress(OSError):
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are wanted
            with suppress(OSError):
                if stat.S_ISSOCK(os.fstat(int(name)).st_mode) and _peer(int(name)) == port:
                    found.add(int(name))
    return found


def _peer(descriptor: int) -> int | None:
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            return -1
        return int(connection.getpeername()[1])
