"""Stores on top of torch's `FileSystemBase`: fsspec's file systems, and those of users."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from secrets import token_hex
from threading import Lock
from types import TracebackType
from typing import Any, Literal

import torch.distributed.checkpoint.filesystem as stock

from shardkeep.dcp.bridge.torch_modules import torch_module
from shardkeep.stores import LocalStore
from shardkeep.stores.contract import (
    Buffer,
    FileInfo,
    IfMatch,
    Listing,
    PutMode,
    Store,
    StoreHints,
    Writer,
)
from shardkeep.stores.errors import file_exists, file_missing, version_changed
from shardkeep.stores.names import checked_name, checked_prefix, checked_range, group_names

__all__ = ["FsspecStore", "StreamStore", "replace", "store_of"]

_METADATA = ".metadata"
_PATTERN_CHARACTERS = frozenset("*?[")
"""Characters that make a path a pattern for fsspec."""
_LARGE_READ_BYTES = 64 << 20
"""Larger reads are limited to the size of the file: a hostile length must not take memory."""
_SAMPLE_BYTES = 4096
"""Number of bytes at the beginning and at the end of a file that its version is computed from, if
the file system has streams only. A commit record ends with the id of its save.
"""
_Entries = tuple[list[str], list[tuple[str, Any]]]
"""Names of files; names and paths of folders."""
_conditional_puts = Lock()
"""Serializes check and rename among the threads of a process, since these file systems have no
conditional puts.
"""


def store_of(storage: Any) -> Store:
    """Return the store for a reader or writer of torch's FileSystem family (`.fs`, `.path`)."""
    fs, path = storage.fs, storage.path
    if type(fs) is stock.FileSystem and not vars(fs):
        return LocalStore(path)
    sync = getattr(storage, "sync_files", True)
    fsspec = torch_module("fsspec_filesystem", "_fsspec_filesystem")
    kind = getattr(fsspec, "_FileSystem", None) or getattr(fsspec, "FileSystem", None)
    if kind is not None and isinstance(fs, kind) and _has_original_streams(fs, kind):
        return FsspecStore(fs, path, sync=sync)
    return StreamStore(fs, path, sync=sync)


def _has_original_streams(fs: Any, kind: Any) -> bool:
    """Return whether a file system has its class's `create_stream`. A user's own must be called."""
    return type(fs).create_stream is kind.create_stream and "create_stream" not in vars(fs)


def replace(fs: Any, source: Any, target: Any) -> None:
    """Rename a file to a name that may exist, even where `rename` refuses to replace a file.

    An existing file is not removed before. It is renamed, and restored if the second rename fails.
    """
    try:
        fs.rename(source, target)
    except Exception:
        if not fs.exists(source) or not fs.exists(target):
            raise
        aside = f"{target}.{token_hex(8)}.old"
        fs.rename(target, aside)
        try:
            fs.rename(source, target)
        except BaseException:
            fs.rename(aside, target)
            raise
        _remove(fs, aside)


def _remove(fs: Any, path: Any) -> None:
    """Remove one file. Torch's `rm_file` lets fsspec interpret its path as a pattern."""
    inner: Any = getattr(fs, "fs", None)
    if _PATTERN_CHARACTERS.isdisjoint(str(path)) or not hasattr(inner, "rm_file"):
        fs.rm_file(path)
    else:
        inner.rm_file(path)


class StreamStore(Store):
    """Files of a `FileSystemBase` of torch, which has streams but no range reads.

    Reads are serialized, as in torch: two streams of one file may share a position (fsspec's
    `memory://`), and the file system may not be safe for several threads.

    Args:
        fs: the file system. If it has no `ls`, only files that this object made and `.metadata` are
            listed.
        path: the folder, in the form that the file system uses.
        sync: sync files to the disk, if their streams have descriptors.
    """

    def __init__(self, fs: Any, path: Any, *, sync: bool = True) -> None:
        self._fs, self._path, self._sync = fs, path, sync
        self._reading = Lock()
        self._lock = Lock()
        self._created: set[str] = set()
        self._writing: set[str] = set()
        self._folders: set[str] = set()

    @property
    def url(self) -> str:
        return str(os.fspath(self._path))

    def path_of(self, name: str) -> Any:
        """Return the path of a file. Raise ValueError if it would be outside of the folder."""
        path = self._path
        for part in checked_name(name).split("/"):
            path = self._fs.concat_path(path, part)
        return path

    @property
    def hints(self) -> StoreHints:
        return StoreHints(concurrency=1, atomic_conditions=False)

    def list(self, prefix: str = "", delimiter: Literal["/"] | None = "/") -> Listing:
        prefix = checked_prefix(prefix)
        if not callable(getattr(self._fs, "ls", None)):
            return group_names(self._known(), prefix, delimiter)
        folder = self._path
        for part in prefix.split("/")[:-1]:
            folder = self._fs.concat_path(folder, part)
        files, folders = self._entries(folder, prefix)
        prefixes = [f"{name}/" for name, _ in folders]
        while delimiter is None and folders:
            name, path = folders.pop()
            more, below = self._entries(path, f"{name}/")
            files += more
            folders += below
        return Listing(tuple(files), tuple(prefixes) if delimiter else ())

    def _known(self) -> set[str]:
        """Return the files that this object made, and the commit record if it exists."""
        with self._lock:
            known = set(self._created)
        if self._exists(self.path_of(_METADATA)):
            known.add(_METADATA)
        return known

    def head(self, name: str) -> FileInfo:
        with self._opened(name) as stream:
            size = int(stream.seek(0, os.SEEK_END))
            stream.seek(0)
            sample = bytes(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, size - _SAMPLE_BYTES))
            sample += bytes(stream.read(_SAMPLE_BYTES))
        return FileInfo(size, f"{size:x}-{hashlib.blake2b(sample, digest_size=16).hexdigest()}")

    def get_range(self, name: str, start: int, length: int) -> bytes:
        checked_range(start, length)
        with self._opened(name) as stream:
            left = min(length, max(0, stream.seek(0, os.SEEK_END) - start))
            if left:
                stream.seek(start)
            parts = []
            while left and (part := stream.read(left)):
                parts.append(bytes(part))
                left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def open_writer(self, name: str) -> Writer:
        plain, path = checked_name(name), self.path_of(name)
        with self._lock:
            # The file may appear only when its stream is closed: until then, reserve the name.
            taken = plain in self._writing
            self._writing.add(plain)
        try:
            if taken or self._exists(path):
                raise file_exists(str(path))
            self._make_folder(plain.rpartition("/")[0])
            return _StreamWriter(
                self._fs, path, self._sync, lambda done: self._written(plain, done)
            )
        except BaseException:
            if not taken:
                self._written(plain, False)
            raise

    def put(self, name: str, data: Buffer, *, mode: PutMode) -> None:
        plain = checked_name(name)
        temporary = f"{plain}.{token_hex(8)}.tmp"
        with self.open_writer(temporary) as writer:
            writer.write(data)
        try:
            with _conditional_puts:
                self._check(plain, mode)
                replace(self._fs, self.path_of(temporary), self.path_of(plain))
        except BaseException:
            self.delete(temporary)
            raise
        with self._lock:
            self._created.discard(temporary)
            self._created.add(plain)

    def _check(self, name: str, mode: PutMode) -> None:
        """Raise an error if the condition for writing a file is not met."""
        path = str(self.path_of(name))
        if mode == "create" and self._exists(self.path_of(name)):
            raise file_exists(path)
        if isinstance(mode, IfMatch):
            try:
                found = self.head(name).version
            except FileNotFoundError:
                found = None
            if found != mode.version:
                raise version_changed(path, mode.version, found)

    def delete(self, name: str) -> None:
        path = self.path_of(name)
        with self._lock:
            self._created.discard(checked_name(name))
        try:
            _remove(self._fs, path)
        except Exception:
            if self._exists(path):
                raise

    def sync(self) -> None:
        """Do nothing: the file system decides when names are durable."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._fs).__name__}, {self.url!r})"

    def _written(self, name: str, done: bool) -> None:
        with self._lock:
            self._writing.discard(name)
            if done:
                self._created.add(name)

    def _exists(self, path: Any) -> bool:
        return bool(self._fs.exists(path))

    def _make_folder(self, folder: str) -> None:
        with self._lock:
            if folder in self._folders:
                return
        self._fs.mkdir(self.path_of(folder) if folder else self._path)
        with self._lock:
            self._folders.add(folder)

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        path = self.path_of(name)
        with self._reading, self._naming(path):
            opened = self._fs.create_stream(path, "rb")
            with opened as stream:
                yield stream

    @contextmanager
    def _naming(self, path: Any) -> Iterator[None]:
        """Raise FileNotFoundError with the path if a file is missing, whatever error was raised."""
        try:
            yield
        except Exception as error:
            if isinstance(error, FileNotFoundError) or not self._exists(path):
                raise file_missing(str(path)) from error
            raise

    def _entries(self, folder: Any, prefix: str) -> _Entries:
        """Return the names of the files in one folder, and the names and paths of its folders.

        `ls` does not tell files from folders, so each entry is tried.
        """
        files: list[str] = []
        folders: list[tuple[str, Any]] = []
        try:
            found = [os.fspath(entry) for entry in self._fs.ls(folder)]
        except FileNotFoundError:
            return files, folders
        for entry in found:
            name = entry.rstrip("/").replace(os.sep, "/").rpartition("/")[2]
            path = self._fs.concat_path(folder, name)
            if self._is_folder(path):
                folders.append((f"{prefix}{name}", path))
            else:
                files.append(f"{prefix}{name}")
        return files, folders

    def _is_folder(self, path: Any) -> bool:
        try:
            inside = [os.fspath(entry).rstrip("/") for entry in self._fs.ls(path)]
        except (FileNotFoundError, NotADirectoryError):
            return False
        except Exception:
            # An error must not make a folder look like a file.
            if self._opens(path):
                return False
            raise
        if len(inside) > 1 or (inside and not str(path).endswith(inside[0])):
            return True
        return not self._opens(path)  # Many file systems list a file as its own content.

    def _opens(self, path: Any) -> bool:
        try:
            with self._reading, self._fs.create_stream(path, "rb"):
                return True
        except Exception:
            return False


class _StreamWriter(Writer):
    """A new file of a `StreamStore`."""

    def __init__(self, fs: Any, path: Any, sync: bool, ended: Callable[[bool], None]) -> None:
        self._fs, self._path, self._sync, self._ended = fs, path, sync, ended
        opened: AbstractContextManager[Any] = fs.create_stream(path, "wb")
        self._opened, self._stream = opened, opened.__enter__()

    def write(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        while view:
            done = self._stream.write(view)
            view = view[done:] if type(done) is int else view[:0]

    def __enter__(self) -> _StreamWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._discard(kind, error, trace)
            return
        try:
            self._stream.flush()
            if self._sync:
                with suppress(AttributeError, io.UnsupportedOperation):
                    os.fsync(self._stream.fileno())
        except BaseException as failure:
            self._discard(type(failure), failure, failure.__traceback__)
            raise
        try:
            self._opened.__exit__(None, None, None)
        except BaseException:
            self._remove()
            raise
        self._ended(True)

    def _discard(self, *error: Any) -> None:
        with suppress(Exception):  # The error that caused this says more.
            self._opened.__exit__(*error)
        self._remove()

    def _remove(self) -> None:
        with suppress(Exception):
            if self._fs.exists(self._path):
                self._fs.rm_file(self._path)
        self._ended(False)


class FsspecStore(StreamStore):
    """Files in any file system of fsspec. Several threads can read ranges at a time."""

    @property
    def _inner(self) -> Any:
        return self._fs.fs

    @property
    def hints(self) -> StoreHints:
        return StoreHints(atomic_conditions=False)

    def list(self, prefix: str = "", delimiter: Literal["/"] | None = "/") -> Listing:
        prefix = checked_prefix(prefix)
        self._inner.invalidate_cache()
        root = str(self._inner._strip_protocol(self.url)).rstrip("/")
        folder = f"{root}/{prefix}".rstrip("/")
        try:
            if delimiter is None:
                found = self._inner.find(folder)
                names = (str(path)[len(root) :].lstrip("/") for path in found if path != folder)
                return Listing(tuple(names))
            entries = self._inner.ls(folder, detail=True)
        except FileNotFoundError:
            return Listing(())
        files, prefixes = [], []
        for entry in entries:
            path = str(entry["name"]).rstrip("/")
            if path == folder:  # Object stores may hold an object with the name of the folder.
                continue
            name = prefix + path.rpartition("/")[2]
            if entry["type"] == "directory" or (
                entry["type"] != "file" and self._inner.isdir(path)
            ):
                prefixes.append(f"{name}/")
            else:
                files.append(name)
        return Listing(tuple(files), tuple(prefixes))

    def head(self, name: str) -> FileInfo:
        path = self.path_of(name)
        self._inner.invalidate_cache()
        with self._naming(path):
            info = self._inner.info(path)
        if info["type"] != "file":
            raise OSError(f"not a regular file: {path}")
        return FileInfo(int(info["size"]), self._inner.ukey(path))

    def get_range(self, name: str, start: int, length: int) -> bytes:
        checked_range(start, length)
        path = self.path_of(name)
        if length > _LARGE_READ_BYTES:
            length = max(0, min(length, self.head(name).size - start))
        if not length:
            return b""
        try:
            with self._naming(path):
                return bytes(self._inner.cat_file(path, start=start, end=start + length))
        except FileNotFoundError:
            raise
        except Exception:
            if start >= self.head(name).size:  # Object stores refuse to read past the end.
                return b""
            raise
