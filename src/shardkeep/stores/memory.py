"""A store in memory, for tests and tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from types import TracebackType
from typing import Literal

from shardkeep.stores.contract import Buffer, FileInfo, IfMatch, Listing, PutMode, Store, Writer
from shardkeep.stores.errors import file_exists, file_missing, version_changed
from shardkeep.stores.names import checked_name, checked_prefix, checked_range, group_names

__all__ = ["MemoryStore"]


@dataclass(slots=True, eq=False)
class _File:
    """The content of one file, and the number of the write that created it (its version)."""

    content: bytearray
    version: int


class MemoryStore(Store):
    """A store that keeps files in a dictionary. Writes are visible at once; nothing is persistent.

    Args:
        url: The name of the store in errors and reports.
        files: Initial files, by name.

    Example:
        >>> store = sk.MemoryStore()
        >>> report = sk.save(state, store)
        >>> report = sk.load(state, store)
    """

    def __init__(self, url: str = "memory", files: Mapping[str, Buffer] | None = None) -> None:
        self._url = url
        self._lock = Lock()
        self._count = 0
        self._files = {name: self._new(data) for name, data in (files or {}).items()}

    @property
    def url(self) -> str:
        return self._url

    def list(self, prefix: str = "", delimiter: Literal["/"] | None = "/") -> Listing:
        prefix = checked_prefix(prefix)
        with self._lock:
            return group_names(self._files, prefix, delimiter)

    def head(self, name: str) -> FileInfo:
        with self._lock:
            file = self._found(name)
            return FileInfo(len(file.content), str(file.version))

    def get_range(self, name: str, start: int, length: int) -> bytes:
        checked_range(start, length)
        with self._lock:
            return bytes(memoryview(self._found(name).content)[start : start + length])

    def put(self, name: str, data: Buffer, *, mode: PutMode) -> None:
        name, path = checked_name(name), f"{self._url}/{name}"
        with self._lock:
            before = self._files.get(name)
            if mode == "create" and before is not None:
                raise file_exists(path)
            if isinstance(mode, IfMatch):
                found = None if before is None else str(before.version)
                if found != mode.version:
                    raise version_changed(path, mode.version, found)
            self._files[name] = self._new(data)

    def open_writer(self, name: str) -> Writer:
        name = checked_name(name)
        with self._lock:
            if name in self._files:
                raise file_exists(f"{self._url}/{name}")
            self._files[name] = file = self._new(b"")
        return _MemoryWriter(self, name, file)

    def delete(self, name: str) -> None:
        with self._lock:
            self._files.pop(checked_name(name), None)

    def __repr__(self) -> str:
        return f"MemoryStore({self._url!r})"

    def _new(self, data: Buffer) -> _File:
        self._count += 1
        return _File(bytearray(data), self._count)

    def _found(self, name: str) -> _File:
        file = self._files.get(checked_name(name))
        if file is None:
            raise file_missing(f"{self._url}/{name}")
        return file

    def _append(self, file: _File, data: Buffer) -> None:
        with self._lock:
            file.content += memoryview(data).cast("B")

    def _discard(self, name: str, file: _File) -> None:
        with self._lock:
            if self._files.get(name) is file:
                del self._files[name]


class _MemoryWriter(Writer):
    """A new file of a `MemoryStore`, visible while it grows."""

    def __init__(self, store: MemoryStore, name: str, file: _File) -> None:
        self._store, self._name, self._file = store, name, file

    def write(self, data: Buffer) -> None:
        self._store._append(self._file, data)

    def __enter__(self) -> _MemoryWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._store._discard(self._name, self._file)
