"""A store that fails or dies at its n-th operation."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from shardkeep.stores import MemoryStore
from shardkeep.stores.contract import Sink, Store

WAYS = [(kind, when) for kind in ("error", "crash") for when in ("before", "after")]


class Died(BaseException):
    """The process is gone: nothing that it does later reaches the store."""


class FaultyStore(Store):
    """Passes everything on to `inner`, until operation number `at` (counted from 0).

    Args:
        kind: "error" raises an OSError once; "crash" raises `Died` from then on, so nothing that
            should clean up does so either.
        when: "before" or "after" the operation has had its effect.
        error: the number of the OSError.
    """

    def __init__(
        self,
        inner: MemoryStore,
        at: int = -1,
        kind: str = "error",
        when: str = "before",
        error: int = errno.ENOSPC,
    ) -> None:
        self.inner, self.at, self.kind, self.when, self.error = inner, at, kind, when, error
        self.log: list[tuple[str, str]] = []
        self.dead = False

    def do(self, what: str, name: str, act: Callable[[], Any]) -> Any:
        if self.dead:
            raise Died
        here = len(self.log) == self.at
        self.log.append((what, name))
        if here and self.when == "before":
            self._fail(name)
        try:
            return act()
        finally:
            if here:
                self._fail(name)

    def _fail(self, name: str) -> None:
        if self.kind == "crash":
            self.dead = True
            raise Died
        raise OSError(self.error, os.strerror(self.error), name)

    @property
    def url(self) -> str:
        return self.inner.url

    def names(self) -> Iterator[str]:
        return self.do("names", "", self.inner.names)

    def size(self, name: str) -> int:
        return self.do("size", name, lambda: self.inner.size(name))

    def read(self, name: str, offset: int, length: int) -> bytes:
        return self.do("read", name, lambda: self.inner.read(name, offset, length))

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        return self.do("read_into", name, lambda: self.inner.read_into(name, offset, buffer))

    def create(self, name: str) -> Sink:
        return FaultySink(self, name, self.do("create", name, lambda: self.inner.create(name)))

    def publish(self, name: str, data: bytes) -> None:
        self.do("publish", name, lambda: self.inner.publish(name, data))

    def remove(self, name: str) -> None:
        self.do("remove", name, lambda: self.inner.remove(name))

    def sync(self) -> None:
        self.do("sync", "", self.inner.sync)


class FaultySink(Sink):
    """A file of such a store; one that was being written in a crash stays as it is."""

    def __init__(self, store: FaultyStore, name: str, sink: Sink) -> None:
        self._store, self._name, self._sink = store, name, sink

    def write(self, data: bytes) -> None:
        self._store.do("write", self._name, lambda: self._sink.write(data))

    def __enter__(self) -> FaultySink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            if not self._store.dead:
                self._sink.__exit__(kind, error, trace)
            return
        try:
            self._store.do("close", self._name, lambda: None)
        except Died:
            raise
        except OSError as failed:
            self._sink.__exit__(type(failed), failed, None)
            raise
        self._sink.__exit__(None, None, None)
