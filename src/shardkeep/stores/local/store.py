"""A folder of the local file system, or of one that is mounted (NFS, Lustre)."""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shardkeep.stores.contract import (
    Buffer,
    FileInfo,
    IfMatch,
    Listing,
    PutMode,
    Store,
    StoreHints,
)
from shardkeep.stores.local import direct_reads
from shardkeep.stores.local.conditions import rename_if_matching, rename_if_new, version_of
from shardkeep.stores.local.descriptors import opened
from shardkeep.stores.local.error_names import naming
from shardkeep.stores.local.files import Direct, LocalPositionedWriter, LocalWriter
from shardkeep.stores.names import checked_name, checked_prefix, checked_range
from shardkeep.types import I64

__all__ = ["LocalStore"]

_NOT_AN_EMPTY_FOLDER = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR)
"""What removing a folder says of one that is not empty, is gone, or is a link or a file."""


class _OpenFile:
    """A file open for reading. Closed with its last reference, so never under a reader's feet."""

    def __init__(self, path: str, flags: int) -> None:
        # Without O_NONBLOCK, opening a FIFO that lies in a hostile checkpoint would never return.
        self._file = opened(path, os.O_RDONLY | os.O_NONBLOCK | flags)
        self.fd = self._file.fileno()
        found = os.fstat(self.fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        self._path, self._identity = path, (found.st_dev, found.st_ino)

    def replaced(self) -> bool:
        """Whether the name that it was opened by is gone, or leads to another file by now.

        Its count of links does not tell: a backup may hold one, and NFS keeps what is still open.
        """
        try:
            found = os.stat(self._path)  # noqa: PTH116 - hot
        except OSError:
            return True  # opening it again says what is wrong
        return (found.st_dev, found.st_ino) != self._identity


class LocalStore(Store):
    """Files below `path`, which need not exist yet. Reading uses at most `open_files` descriptors.

    Bytes that are in the page cache are copied out of it; others come past it, where the kernel
    tells which is which and the file system lets. Files of known size are written past it, too.
    Neither is so if `direct` is False. The buffers for it take half of `budget` bytes at most.

    Closing it (or leaving its `with` block) closes the files and frees the buffers; it can be used
    again afterwards.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        open_files: int = 64,
        direct: bool = True,
        budget: int | None = None,
    ) -> None:
        self._root = os.fspath(path) or "."
        self._options: dict[str, Any] = {
            "open_files": open_files,
            "direct": direct,
            "budget": budget,
        }
        self._limit = max(1, open_files)
        self._lock = Lock()
        self._open: OrderedDict[tuple[str, int], _OpenFile] = OrderedDict()
        self._cold = direct_reads.ColdReads(direct, budget)
        self._unsynced: set[str] = set()
        self._syncing = Lock()
        self._ancestors_synced = False
        self._direct = Direct(direct)

    @property
    def url(self) -> str:
        return self._root

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self._root)

    def path_of(self, name: str) -> str:
        """The file's path in the file system; ValueError if the name would leave the folder."""
        return os.path.join(self._root, checked_name(name))  # noqa: PTH118 - hot, and text is wanted

    @property
    def hints(self) -> StoreHints:
        return StoreHints(request_bytes=direct_reads.PIECE, positioned_writes=True)

    def list(self, prefix: str = "", delimiter: Literal["/"] | None = "/") -> Listing:
        prefix = checked_prefix(prefix)
        files, folders = _scan(self._root, prefix)
        prefixes = [f"{folder}/" for folder, _ in folders]
        while delimiter is None and folders:
            inner, is_link = folders.pop()
            if not is_link:
                more, below = _scan(self._root, f"{inner}/")
                files += more
                folders += below
        return Listing(tuple(files), tuple(prefixes) if delimiter else ())

    def head(self, name: str) -> FileInfo:
        path = self.path_of(name)
        found = os.stat(path)  # noqa: PTH116 - hot
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        # Over a network, the time is the server's.
        return FileInfo(found.st_size, version_of(found), found.st_mtime)

    def get_range(self, name: str, start: int, length: int) -> bytes:
        checked_range(start, length)
        path = self.path_of(name)
        with naming(path):
            file = self._file(path)
            # Clamped first: a length out of a hostile checkpoint must not allocate memory.
            left = max(0, min(length, os.fstat(file.fd).st_size - start))
            parts = []
            while left and (part := os.pread(file.fd, left, start)):
                parts.append(part)
                start += len(part)
                left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, name: str, start: int, buffer: memoryview) -> int:
        return max(self.read_steps(name, start, buffer, direct_reads.PIECE), default=0)

    def read_steps(
        self, name: str, start: int, buffer: memoryview, step: int, *, keep: bool = False
    ) -> Iterator[int]:
        path = self.path_of(name)
        view = buffer.cast("B")
        checked_range(start, len(view))
        with naming(path):
            file = self._file(path)
            for low in range(0, len(view), direct_reads.PIECE):
                piece = view[low : low + direct_reads.PIECE]
                done = 0
                if not keep and self._cold.pays(file.fd, start + low, len(piece)):
                    for done in self._read_direct(path, start + low, piece, step):
                        yield low + done
                while done < len(piece):
                    rest = piece[done : done + step]
                    read = os.preadv(file.fd, [rest], start + low + done)
                    if not read:
                        return
                    done += read
                    yield low + done

    def read_rows(self, name: str, starts: I64, into: NDArray[np.uint8]) -> bool:
        path = self.path_of(name)
        low, high = int(starts.min()), int(starts.max()) + into.shape[1]
        checked_range(low, high - low)
        with naming(path):
            file = self._file(path)
            if self._cold.pays(file.fd, low, high - low):
                return False
            for start, row in zip(starts.tolist(), into, strict=True):
                if os.preadv(file.fd, [row], start) != len(row):
                    return False
        return True

    def open_writer(self, name: str) -> LocalWriter:
        return LocalWriter(self._new(name))

    def open_positioned_writer(self, name: str, nbytes: int) -> LocalPositionedWriter:
        return LocalPositionedWriter(self._new(name), nbytes, self._direct)

    def _new(self, name: str) -> str:
        """The path of a file that is about to be made: its folder will have to be synced."""
        path = self.path_of(name)
        folder = os.path.dirname(path)  # noqa: PTH120
        self._make(folder)
        with self._lock:
            self._unsynced.add(folder)
        return path

    def put(self, name: str, data: Buffer, *, mode: PutMode) -> None:
        path = self.path_of(name)
        temporary = f"{checked_name(name)}.{token_hex(8)}.tmp"
        try:
            with self.open_writer(temporary) as writer:
                writer.write(data)
            self._sync_ancestors()
            _rename(self.path_of(temporary), path, mode)
        except BaseException:
            with suppress(OSError):  # it must not hide what went wrong
                self.delete(temporary)
            raise
        finally:
            self._forget(path)
        self.sync()

    def _sync_ancestors(self) -> None:
        """Make durable what leads to the folder, once.

        A save that was killed, or the caller, may have made it and those above it, and not have
        synced them: then a power loss would take the folder away with all that is in it.
        """
        if not self._ancestors_synced:
            for folder in _ancestors(self._root):
                # What may not be opened is not this job's, so it was not made for it just now.
                with suppress(PermissionError):
                    _sync_folder(folder)
            self._ancestors_synced = True

    def delete(self, name: str) -> None:
        path = self.path_of(name)
        self._forget(path)
        try:
            os.unlink(path)  # noqa: PTH108
        except FileNotFoundError:
            return
        with self._lock:
            self._unsynced.add(os.path.dirname(path))  # noqa: PTH120

    def sync(self) -> None:
        # One after the other: who finds nothing to sync must know that it is synced.
        with self._syncing:
            with self._lock:
                folders, self._unsynced = self._unsynced, set()
            try:
                for folder in sorted(folders):
                    _sync_folder(folder)
            except BaseException:
                with self._lock:
                    self._unsynced |= folders
                raise

    def is_link(self, folder: str) -> bool:
        return os.path.islink(self.path_of(folder))  # noqa: PTH114

    def subfolder(self, folder: str) -> LocalStore:
        return LocalStore(self.path_of(folder), **self._options)

    def remove_folder(self, folder: str) -> None:
        path = self.path_of(folder)
        try:
            os.rmdir(path)  # noqa: PTH106
        except OSError as error:
            if error.errno not in _NOT_AN_EMPTY_FOLDER:
                raise

    def close(self) -> None:
        """Close the files that are open for reading, and free the buffers."""
        with self._lock:
            self._open.clear()
        self._cold.close()

    def __enter__(self) -> LocalStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LocalStore({self._root!r})"

    def _file(self, path: str, flags: int = 0) -> _OpenFile:
        key = path, flags
        with self._lock:
            file = self._open.get(key)
            if file is not None:
                self._open.move_to_end(key)
        if file is not None and not file.replaced():
            return file
        file = _OpenFile(path, flags)
        with self._lock:
            self._open[key] = file
            self._open.move_to_end(key)
            while len(self._open) > self._limit:
                self._open.popitem(last=False)
        return file

    def _forget(self, path: str) -> None:
        with self._lock:
            for flags in (0, direct_reads.FLAG):
                self._open.pop((path, flags), None)

    def _read_direct(self, path: str, offset: int, view: memoryview, step: int) -> Iterator[int]:
        """As `ColdReads.read`, of a file that is opened for it."""
        file = None
        with self._cold.refusals():
            file = self._file(path, direct_reads.FLAG)
        if file is not None:
            yield from self._cold.read(file.fd, offset, view, step)

    def _make(self, folder: str) -> None:
        """Make a folder and those above it; what gained a name by that is synced later."""
        if not folder or os.path.isdir(folder):  # noqa: PTH112
            return
        above = os.path.dirname(folder)  # noqa: PTH120
        self._make(above)
        with self._lock:  # before it is made: another thread may find it, and sync what it uses
            self._unsynced.add(above)
        with suppress(FileExistsError):  # made by another rank at the same time: it syncs it
            os.mkdir(folder)  # noqa: PTH102


def _scan(root: str, prefix: str) -> tuple[list[str], list[tuple[str, bool]]]:
    """Return the names in one folder: of its files; of its folders, and whether each is a link.

    A folder that is missing is empty; one that cannot be read must not look empty.
    """
    files: list[str] = []
    folders: list[tuple[str, bool]] = []
    with suppress(FileNotFoundError), os.scandir(os.path.join(root, prefix)) as entries:  # noqa: PTH118
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link that leads to itself
                is_folder = False
            if is_folder:
                folders.append((f"{prefix}{entry.name}", entry.is_symlink()))
            else:
                files.append(f"{prefix}{entry.name}")
    return files, folders


def _rename(source: str, target: str, mode: PutMode) -> None:
    """Give a new file its name, if the condition holds."""
    if isinstance(mode, IfMatch):
        rename_if_matching(source, target, mode.version)
    elif mode == "create":
        rename_if_new(source, target)
    else:
        os.replace(source, target)  # noqa: PTH105


def _ancestors(folder: str) -> list[str]:
    """The folders above it, up to the root of its file system, nearest first; links followed."""
    found, inner = [], os.path.realpath(folder)
    device = os.stat(inner).st_dev  # noqa: PTH116
    while (above := os.path.dirname(inner)) != inner:  # noqa: PTH120
        if os.stat(above).st_dev != device:  # noqa: PTH116
            break
        found.append(above)
        inner = above
    return found


def _sync_folder(folder: str) -> None:
    folder = folder or "."
    with naming(folder):
        held: list[int] = []
        try:
            # In one go of C code: between two calls, a Ctrl-C would lose the number.
            held.extend(map(os.open, [folder], [os.O_RDONLY | os.O_DIRECTORY]))
            os.fsync(held[0])
        except OSError as error:
            # Some mounted file systems (CIFS, several FUSE) refuse to sync a folder.
            if not held or error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            for fd in held:
                os.close(fd)
