"""A store that fails, waits or crashes on purpose, always in the same way for the same plan."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from threading import Lock
from types import TracebackType
from typing import Literal, NamedTuple, TypeVar

from shardkeep.stores.contract import (
    Buffer,
    FileInfo,
    Listing,
    PutMode,
    Store,
    StoreHints,
    Writer,
)

__all__ = [
    "Crashed",
    "Fault",
    "FaultPlan",
    "FaultyStore",
    "Operation",
    "fail_at",
    "fail_randomly",
]

T = TypeVar("T")


class Crashed(BaseException):
    """The simulated process is dead: nothing that it does afterwards reaches the store."""


class Operation(NamedTuple):
    """One operation on a `FaultyStore`.

    Attributes:
        number: How many operations came before it.
        method: The method of the store, or "write" and "close" of a file that is being written.
        name: The file, or the prefix of a listing.
        repetition: How many operations with the same method and name came before it.
    """

    number: int
    method: str
    name: str
    repetition: int


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with one operation.

    Attributes:
        kind: "error" raises an `OSError` once. "crash" raises `Crashed`, now and from now on, so
            that nothing that should clean up does so either. "delay" only waits.
        when: Whether it happens before or after the operation has had its effect.
        error_number: The number of the `OSError`.
        delay_seconds: How long the operation waits before it starts.
    """

    kind: Literal["error", "crash", "delay"] = "error"
    when: Literal["before", "after"] = "before"
    error_number: int = errno.EIO
    delay_seconds: float = 0.0


FaultPlan = Callable[[Operation], Fault | None]
"""Returns the fault of an operation; None lets it succeed."""


def fail_at(number: int, fault: Fault | None = None) -> FaultPlan:
    """Return a plan in which one operation fails: by default with EIO, before it has an effect.

    Example:
        >>> plan = fail_at(2)
        >>> plan(Operation(2, "put", "x", 0))
        Fault(kind='error', when='before', error_number=5, delay_seconds=0.0)
    """
    fault = fault or Fault()
    return lambda operation: fault if operation.number == number else None


def fail_randomly(
    seed: int, *, error_rate: float = 0.1, max_delay_seconds: float = 0.0
) -> FaultPlan:
    """Return a plan in which operations fail and wait at random.

    What happens to an operation depends only on the seed, the method, the name, and how often that
    was called before, not on the order of threads.

    Args:
        seed: Equal seeds give equal plans.
        error_rate: The share of operations that fail.
        max_delay_seconds: Operations wait for up to this long.
    """

    def plan(operation: Operation) -> Fault | None:
        # A text as seed: it is the same in all processes, unlike the hash of a tuple.
        random = Random(f"{seed}/{operation.method}/{operation.name}/{operation.repetition}")
        fails, after = random.random() < error_rate, random.random() < 0.5
        delay_seconds = random.uniform(0, max_delay_seconds)
        if not fails and not delay_seconds:
            return None
        kind: Literal["error", "delay"] = "error" if fails else "delay"
        return Fault(kind, "after" if after else "before", delay_seconds=delay_seconds)

    return plan


class FaultyStore(Store):
    """A store that passes everything on to another one, and fails by a plan.

    Args:
        inner: The store that does the work.
        plan: What goes wrong; by default nothing.

    Attributes:
        inner: The store that does the work.
        log: The method and name of each operation, in order.
        crashed: Whether the simulated process is dead.

    Example:
        >>> from shardkeep.stores import MemoryStore
        >>> store = FaultyStore(MemoryStore(), fail_at(1))
        >>> store.put("x", b"first", mode="create")
        >>> store.put("x", b"second", mode="replace")
        Traceback (most recent call last):
        OSError: [Errno 5] Input/output error: 'x'
        >>> store.log
        [('put', 'x'), ('put', 'x')]
    """

    def __init__(self, inner: Store, plan: FaultPlan | None = None) -> None:
        self.inner = inner
        self.log: list[tuple[str, str]] = []
        self.crashed = False
        self._plan = plan or (lambda _: None)
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = Lock()

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def hints(self) -> StoreHints:
        hints = self.inner.hints
        return StoreHints(hints.request_bytes, hints.concurrency, False, hints.atomic_conditions)

    def list(self, prefix: str = "", delimiter: Literal["/"] | None = "/") -> Listing:
        return self.run("list", prefix, lambda: self.inner.list(prefix, delimiter))

    def head(self, name: str) -> FileInfo:
        return self.run("head", name, lambda: self.inner.head(name))

    def get_range(self, name: str, start: int, length: int) -> bytes:
        return self.run("get_range", name, lambda: self.inner.get_range(name, start, length))

    def read_into(self, name: str, start: int, buffer: memoryview) -> int:
        return self.run("read_into", name, lambda: self.inner.read_into(name, start, buffer))

    def put(self, name: str, data: Buffer, *, mode: PutMode) -> None:
        self.run("put", name, lambda: self.inner.put(name, data, mode=mode))

    def open_writer(self, name: str) -> Writer:
        writer = self.run("open_writer", name, lambda: self.inner.open_writer(name))
        return _FaultyWriter(self, name, writer)

    def delete(self, name: str) -> None:
        self.run("delete", name, lambda: self.inner.delete(name))

    def sync(self) -> None:
        self.run("sync", "", self.inner.sync)

    def close(self) -> None:
        self.inner.close()

    def run(self, method: str, name: str, act: Callable[[], T]) -> T:
        """Do one operation as the plan says.

        Raises:
            Crashed: The process is dead, or dies now.
            OSError: The operation fails.
        """
        with self._lock:
            if self.crashed:
                raise Crashed
            repetition = self._counts[method, name]
            self._counts[method, name] += 1
            operation = Operation(len(self.log), method, name, repetition)
            self.log.append((method, name))
        fault = self._plan(operation)
        if fault is None:
            return act()
        if fault.delay_seconds:
            time.sleep(fault.delay_seconds)
        if fault.when == "before":
            self._fail(fault, name)
        try:
            return act()
        finally:
            if fault.when == "after":
                self._fail(fault, name)

    def _fail(self, fault: Fault, name: str) -> None:
        if fault.kind == "crash":
            self.crashed = True
            raise Crashed
        if fault.kind == "error":
            raise OSError(fault.error_number, os.strerror(fault.error_number), name)


class _FaultyWriter(Writer):
    """A new file of a `FaultyStore`. After a crash it stays as it was then."""

    def __init__(self, store: FaultyStore, name: str, writer: Writer) -> None:
        self._store, self._name, self._writer = store, name, writer

    def write(self, data: Buffer) -> None:
        self._store.run("write", self._name, lambda: self._writer.write(data))

    def __enter__(self) -> _FaultyWriter:
        self._writer.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            if not self._store.crashed:
                self._writer.__exit__(kind, error, trace)
            return
        try:
            self._store.run("close", self._name, lambda: None)
        except OSError as failure:
            self._writer.__exit__(type(failure), failure, None)
            raise
        self._writer.__exit__(None, None, None)
