"""New local files, written sequentially or at any offset, with direct I/O where that works."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

from shardkeep.settings import PAGE
from shardkeep.stores.contract import Buffer
from shardkeep.stores.local import syscalls
from shardkeep.stores.local.buffers import AT_ONCE, after
from shardkeep.stores.local.descriptors import opened
from shardkeep.stores.local.error_names import naming

__all__ = ["Direct", "LocalPositionedWriter", "LocalWriter", "is_direct"]

_REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
_NOT_DIRECT = (errno.EINVAL, errno.EFAULT)
"""Errors of a direct write that a file system, or a buffer in device memory, does not support."""


class Direct:
    """Whether the files of a store support direct I/O, which is detected by trying once."""

    def __init__(self, wanted: bool = True) -> None:
        self.works = wanted and hasattr(os, "O_DIRECT")

    def ask(self, fd: int) -> None:
        """Enable direct I/O for an open file, if the file system supports it."""
        if not self.works:
            return
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            self.works = False

    def refuse(self, fd: int) -> None:
        """Disable direct I/O for a file, if it is enabled, and for all later files of the store."""
        if is_direct(fd):
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            self.works = False


def is_direct(fd: int) -> bool:
    """Return whether writes to a file bypass the page cache."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


class _NewFile:
    """A file that is being written: durable when its block ends, removed if the block fails.

    Args:
        path: Path of the file, which must not exist.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    @property
    def _fd(self) -> int:
        return self._file.fileno()

    def _end(self) -> None:
        """Finish the content, before the file is synced."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with naming(self._path):
                    self._end()
                    os.fsync(self._fd)
                    self._file.close()
        except BaseException:
            self._discard()
            raise
        if kind is not None:
            self._discard()

    def _discard(self) -> None:
        with suppress(OSError):
            self._file.close()
        with suppress(FileNotFoundError):
            os.unlink(self._path)  # noqa: PTH108


class LocalWriter(_NewFile):
    """Sequential writer of a new local file; see `stores.contract.Writer`."""

    def write(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        with naming(self._path):
            while view:
                view = view[os.write(self._fd, view) :]

    def __enter__(self) -> LocalWriter:
        return self


class LocalPositionedWriter(_NewFile):
    """Writer of a new local file at any offset; see `stores.abilities.PositionedWriter`.

    Its space is reserved when it is created.

    Args:
        path: Path of the file, which must not exist.
        nbytes: Size of the file in bytes.
        direct: Whether the file system supports direct I/O.

    Raises:
        FileExistsError: The file exists.
        OSError: There is not enough space (ENOSPC), or another error; no file is left.
    """

    def __init__(self, path: str, nbytes: int, direct: Direct) -> None:
        super().__init__(path)
        self._nbytes, self._direct = nbytes, direct
        try:
            with naming(path):
                # Without reserved space, each direct write would wait until the file has grown.
                syscalls.allocate(self._fd, -(-nbytes // PAGE) * PAGE)
                # Set after opening, because an open with O_DIRECT may fail and leave the file
                # behind.
                direct.ask(self._fd)
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> LocalPositionedWriter:
        return self

    def _end(self) -> None:
        os.ftruncate(self._fd, self._nbytes)

    def write_at(self, offset: int, parts: Sequence[memoryview]) -> None:
        with naming(self._path):
            while parts:
                # Read before the call: another thread's refused write may clear the flag meanwhile.
                direct = is_direct(self._fd)
                try:
                    done = os.pwritev(self._fd, parts[:AT_ONCE], offset)
                except OSError as error:
                    if not direct or error.errno not in _NOT_DIRECT:
                        raise
                    self._direct.refuse(self._fd)
                    continue
                if done % PAGE:
                    self._direct.refuse(self._fd)  # the rest is not aligned any more
                parts, offset = after(parts, done), offset + done
