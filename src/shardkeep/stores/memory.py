"""A store in memory, for tests and tools."""

from __future__ import annotations

from collections.abc import Iterator
from errno import EEXIST, ENOENT
from os import strerror
from threading import Lock
from types import TracebackType

from shardkeep.stores.contract import Buffer, Store
from shardkeep.stores.names import checked, checked_range

__all__ = ["MemoryStore"]


class MemoryStore(Store):
    """Files in a dictionary. What is written is there at once; nothing outlives the object."""

    def __init__(self, url: str = "memory") -> None:
        self._url = url
        self._lock = Lock()
        self._files: dict[str, bytearray] = {}

    @property
    def url(self) -> str:
        return self._url

    def names(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._files))

    def size(self, name: str) -> int:
        with self._lock:
            return len(self._found(name))

    def read(self, name: str, offset: int, length: int) -> bytes:
        checked_range(offset, length)
        with self._lock:
            return bytes(memoryview(self._found(name))[offset : offset + length])

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        view = buffer.cast("B")
        part = self.read(name, offset, len(view))
        view[: len(part)] = part
        return len(part)

    def create(self, name: str) -> MemorySink:
        name = checked(name)
        with self._lock:
            if name in self._files:
                raise FileExistsError(EEXIST, strerror(EEXIST), f"{self._url}/{name}")
            self._files[name] = content = bytearray()
        return MemorySink(self, name, content)

    def publish(self, name: str, data: Buffer) -> None:
        content = bytearray(data)
        with self._lock:
            self._files[checked(name)] = content

    def remove(self, name: str) -> None:
        with self._lock:
            self._files.pop(checked(name), None)

    def sync(self) -> None:
        """Nothing to do: nothing is durable."""

    def __repr__(self) -> str:
        return f"MemoryStore({self._url!r})"

    def _found(self, name: str) -> bytearray:
        content = self._files.get(checked(name))
        if content is None:
            raise FileNotFoundError(ENOENT, strerror(ENOENT), f"{self._url}/{name}")
        return content

    def _append(self, content: bytearray, data: Buffer) -> None:
        with self._lock:
            content += memoryview(data).cast("B")

    def _discard(self, name: str, content: bytearray) -> None:
        with self._lock:
            if self._files.get(name) is content:
                del self._files[name]


class MemorySink:
    """A new file being written; see `stores.contract.Sink`."""

    def __init__(self, store: MemoryStore, name: str, content: bytearray) -> None:
        self._store, self._name, self._content = store, name, content

    def write(self, data: Buffer) -> None:
        self._store._append(self._content, data)

    def __enter__(self) -> MemorySink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._store._discard(self._name, self._content)
