"""Store in a folder of the local file system or of a mounted one (NFS, Lustre)."""

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
"""Errors of rmdir for a path that is not an empty folder: not empty, missing, a link or a file."""


class _OpenFile:
    """A file that is open for reading; closed with the last reference, so never during a read."""

    def __init__(self, path: str, flags: int) -> None:
        # Without O_NONBLOCK, opening a FIFO in a hostile checkpoint would block forever.
        self._file = opened(path, os.O_RDONLY | os.O_NONBLOCK | flags)
        self.fd = self._file.fileno()
        found = os.fstat(self.fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        self._path, self._identity = path, (found.st_dev, found.st_ino)

    def replaced(self) -> bool:
        """Return whether the path is gone or refers to another file by now.

        The link count is not sufficient: a backup may hold another link, and NFS keeps open files.
        """
        try:
            found = os.stat(self._path)  # noqa: PTH116 - hot
        except OSError:
            return True  # opening the file again raises the error
        return (found.st_dev, found.st_ino) != self._identity


class LocalStore(Store):
    """A store of the files below `path`, which need not exist yet.

    Bytes in the page cache are copied from it. Others are read with direct I/O, if the kernel
    reports what is cached and the file system supports it. Files of known size are written with
    direct I/O, too.

    Closing the store (or leaving its `with` block) closes its files and frees its buffers. It can
    be used again afterwards.

    Args:
        path: Path of the folder.
        open_files: Maximum number of descriptors that are kept open for reading.
        direct: Whether to use direct I/O.
        budget: Memory limit in bytes; at most half of it is used for buffers of direct reads. By
            default the setting SHARDKEEP_MAX_HOST_MEMORY_BYTES.

    Example:
        >>> with sk.LocalStore("run/step_100", direct=False) as store:
        ...     report = sk.load(state, store)
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
        """Return the path of the folder."""
        return Path(self._root)

    def path_of(self, name: str) -> str:
        """Return the path of a file; raise ValueError if its name would leave the folder."""
        return os.path.join(self._root, checked_name(name))  # noqa: PTH118 - hot, and returns str

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
        # On a network file system, the time is the server's.
        return FileInfo(found.st_size, version_of(found), found.st_mtime)

    def get_range(self, name: str, start: int, length: int) -> bytes:
        checked_range(start, length)
        path = self.path_of(name)
        with naming(path):
            file = self._file(path)
            # Limited to the file: a length from a hostile checkpoint must not allocate memory.
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
        """Return the path of a file that is about to be created; its folder is synced later."""
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
            with suppress(OSError):  # it must not hide the original error
                self.delete(temporary)
            raise
        finally:
            self._forget(path)
        self.sync()

    def _sync_ancestors(self) -> None:
        """Sync the folders above this one, once.

        A save that was killed, or the caller, may have created them without a sync. A power loss
        would then remove them with all their content.
        """
        if not self._ancestors_synced:
            for folder in _ancestors(self._root):
                # This job did not create a folder that it may not open.
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
        # One thread at a time: a thread that finds nothing to sync must know that it is synced.
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
        """Read with `ColdReads.read` from a file that is opened for direct reads."""
        file = None
        with self._cold.refusals():
            file = self._file(path, direct_reads.FLAG)
        if file is not None:
            yield from self._cold.read(file.fd, offset, view, step)

    def _make(self, folder: str) -> None:
        """Create a folder and its parents; the folders that gain a name are synced later."""
        if not folder or os.path.isdir(folder):  # noqa: PTH112
            return
        above = os.path.dirname(folder)  # noqa: PTH120
        self._make(above)
        with self._lock:  # before mkdir: another thread may use the new folder and sync
            self._unsynced.add(above)
        with suppress(FileExistsError):  # another rank created it meanwhile, and syncs it
            os.mkdir(folder)  # noqa: PTH102


def _scan(root: str, prefix: str) -> tuple[list[str], list[tuple[str, bool]]]:
    """Return the files in one folder, and its folders with whether each is a symbolic link.

    A missing folder is empty. A folder that cannot be read raises an error, so it does not look
    empty.
    """
    files: list[str] = []
    folders: list[tuple[str, bool]] = []
    with suppress(FileNotFoundError), os.scandir(os.path.join(root, prefix)) as entries:  # noqa: PTH118
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError:  # a symbolic link to itself
                is_folder = False
            if is_folder:
                folders.append((f"{prefix}{entry.name}", entry.is_symlink()))
            else:
                files.append(f"{prefix}{entry.name}")
    return files, folders


def _rename(source: str, target: str, mode: PutMode) -> None:
    """Rename a new file to its final name, if the condition holds."""
    if isinstance(mode, IfMatch):
        rename_if_matching(source, target, mode.version)
    elif mode == "create":
        rename_if_new(source, target)
    else:
        os.replace(source, target)  # noqa: PTH105


def _ancestors(folder: str) -> list[str]:
    """Return the parents of a folder, nearest first, up to the root of its file system.

    Symbolic links are resolved first.
    """
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
            # In one call of C code: a Ctrl-C between two calls would lose the descriptor.
            held.extend(map(os.open, [folder], [os.O_RDONLY | os.O_DIRECTORY]))
            os.fsync(held[0])
        except OSError as error:
            # Some mounted file systems (CIFS, several FUSE) refuse to sync a folder.
            if not held or error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            for fd in held:
                os.close(fd)
