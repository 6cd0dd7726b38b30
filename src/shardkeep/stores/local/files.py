"""New local files: written front to back, or at any place and past the page cache."""

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
"""What a direct write says of a file system, or of memory (a device's), that can't be used so."""


class Direct:
    """Whether a store's files take direct I/O: found out by trying, once."""

    def __init__(self, wanted: bool = True) -> None:
        self.works = wanted and hasattr(os, "O_DIRECT")

    def ask(self, fd: int) -> None:
        """Set direct I/O for a file that is open, if it works here."""
        if not self.works:
            return
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            self.works = False

    def refuse(self, fd: int) -> None:
        """Go on without: in this file, if it is direct until now, and in all that come after it."""
        if is_direct(fd):
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            self.works = False


def is_direct(fd: int) -> bool:
    """Whether a file is written to past the page cache."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


class _NewFile:
    """A file that is being written: durable when its block is left in peace, else gone.

    Args:
        path: of the file; it must not exist.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    @property
    def _fd(self) -> int:
        return self._file.fileno()

    def _end(self) -> None:
        """What is to be done before it is synced."""

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
    """See `stores.contract.Writer`."""

    def write(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        with naming(self._path):
            while view:
                view = view[os.write(self._fd, view) :]

    def __enter__(self) -> LocalWriter:
        return self


class LocalPositionedWriter(_NewFile):
    """See `stores.abilities.PositionedWriter`. Its space is reserved when it is made.

    Args:
        path: of the file; it must not exist.
        nbytes: its size.
        direct: what is known of the file system.

    Raises:
        FileExistsError, OSError: ENOSPC, if there is no room for it; nothing is left then.
    """

    def __init__(self, path: str, nbytes: int, direct: Direct) -> None:
        super().__init__(path)
        self._nbytes, self._direct = nbytes, direct
        try:
            with naming(path):
                # Without its space at hand, each direct write would wait for the file to grow.
                syscalls.allocate(self._fd, -(-nbytes // PAGE) * PAGE)
                # Only now: an open that asks for it may fail and leave the file behind.
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
                # Before the call: another thread may be refused at the same time, and be first.
                direct = is_direct(self._fd)
                try:
                    done = os.pwritev(self._fd, parts[:AT_ONCE], offset)
                except OSError as error:
                    if not direct or error.errno not in _NOT_DIRECT:
                        raise
                    self._direct.refuse(self._fd)
                    continue
                if done % PAGE:
                    self._direct.refuse(self._fd)  # What is left is not aligned any more.
                parts, offset = after(parts, done), offset + done
