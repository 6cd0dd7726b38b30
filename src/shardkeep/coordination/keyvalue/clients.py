"""Clients of the job's store that belong to Shardkeep alone, and give up on a frozen host."""

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

_MIN_ANSWER_SECONDS = 7.0
"""How long the store's host may always take for an answer. A client that connects may make it look
up a host name, which takes 5 s if the name server does not answer, and all others wait."""


class Client:
    """A client of a `torch.distributed.Store`, whose calls fail as `KeyValueStore` says.

    Attributes:
        store: torch's client.
        is_remote: whether another process answers, as with TCPStore.
        lost: why the store is out of reach for good; None if it is not.
    """

    def __init__(self, store: Any, answer_seconds: float) -> None:
        self.store, self._answer_seconds = store, answer_seconds
        self.is_remote = _is_remote(_unwrapped(store))
        self.lost: str | None = None
        self._lock = Lock()

    def call(self, key: str, act: Callable[[Any], T]) -> T:
        """Return what `act` returns for the store.

        Raises:
            KeyError: `key` does not exist (any more).
            ConnectionError: the store is out of reach.
        """
        # One call at a time, as in torch's client. Otherwise, if the host is frozen, each of the
        # waiting threads would wait for a timeout of its own, one after the other.
        with self._lock:
            return self._call(key, act)

    def _call(self, key: str, act: Callable[[Any], T]) -> T:
        if self.lost is not None:
            raise ConnectionError(self.lost)
        try:
            return act(self.store)
        except RuntimeError as error:  # torch raises it for everything.
            text = str(error).strip()
            if "Socket Timeout" in text:
                # A late answer would be taken for the answer to the next question.
                self.lost = f"no answer for {self._answer_seconds:g} s"
                raise ConnectionError(self.lost) from error
            if "timeout" in text.lower():
                raise KeyError(key) from error
            raise ConnectionError(text.splitlines()[0] if text else repr(error)) from error


_clients: WeakKeyDictionary[Any, Client] = WeakKeyDictionary()
"""Store -> our client of it, for as long as the job keeps the store. If each save made a new one,
torch would look up the host name each time, which takes 5 s if the name server does not answer."""
_connecting = Lock()


def client_of(store: Any) -> Client:
    """Return our own client of a store.

    A call of the job's client that waits for a key would delay all other calls of that client.
    """
    with _connecting:
        client = _clients.get(store)
        if client is None or client.lost is not None:
            client = _connect(store)
            if client.store is not store:
                _clients[store] = client
    return client


def _connect(store: Any) -> Client:
    seconds = max(_MIN_ANSWER_SECONDS, Timeouts.from_settings().silence_seconds)
    server = _unwrapped(store)
    with _answer_timeout(seconds, getattr(server, "port", None)):
        try:
            own = store.clone()
        except (AttributeError, RuntimeError):  # torch before 2.8, or a kind that has no clone
            own = _second_client(server, timedelta(seconds=seconds)) or store
    if own is not store:
        own.set_timeout(timedelta(seconds=seconds))
    return Client(own, seconds)


def _unwrapped(store: Any) -> Any:
    """Return the store without the prefixes that it is wrapped in."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store


def _is_remote(server: Any) -> bool:
    return hasattr(server, "host") and hasattr(server, "port")


def _second_client(server: Any, timeout: timedelta) -> Any:
    if not _is_remote(server):
        return None  # A store in files or in memory has no connection that a call could occupy.
    return type(server)(
        server.host, server.port, is_master=False, timeout=timeout, wait_for_workers=False
    )


@contextmanager
def _answer_timeout(seconds: float, port: int | None) -> Iterator[None]:
    """Limit how long a client that is made in the block waits for each answer.

    If the process that hosts the store is frozen, its connections stay open. torch has no timeout
    for a single answer (seen in 2.13), but its sockets obey that of the operating system.
    """
    before = _connections(port)
    yield
    limit = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    for descriptor in _connections(port) - before:
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def _connections(port: int | None) -> set[int]:
    """Return the descriptors of this process's connections to a port, if the system lists them."""
    found = set()
    with suppress(OSError):
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - only the names are needed
            with suppress(OSError):
                is_socket = stat.S_ISSOCK(os.fstat(int(name)).st_mode)
                if is_socket and _remote_port(int(name)) == port:
                    found.add(int(name))
    return found


def _remote_port(descriptor: int) -> int | None:
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            return -1
        return int(connection.getpeername()[1])
