"""Renames that are conditional on the target file, each atomic across processes.

"Create" is one system call that fails if the target exists. "If it matches" is a comparison and a
rename under a lock (flock) on the file that is replaced. The kernel releases the lock when its
holder dies. A process that waited for the lock then finds that the name refers to another file.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from shardkeep.stores.errors import file_exists, version_changed
from shardkeep.stores.local import syscalls
from shardkeep.stores.local.descriptors import Descriptor, opened

__all__ = ["rename_if_matching", "rename_if_new", "version_of"]

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY)

_LOCK_SECONDS = 10.0
"""Maximum time to wait for a lock, which others hold for a few system calls only."""
_POLL_SECONDS = 0.005

_log = logging.getLogger("shardkeep")


def version_of(found: os.stat_result) -> str:
    """Return the version of a file, which differs between any two files that have had one name.

    It does not include the change time (ctime), which a backup by hard links changes.
    """
    return f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"


def rename_if_new(source: str, target: str) -> None:
    """Rename a file unless `target` exists.

    Raises:
        FileExistsError: `target` exists, and stays as it is.
    """
    try:
        if syscalls.rename_new(source, target):
            return
    except FileExistsError:
        raise file_exists(target) from None
    # NFS does not support renameat2, but hard links are exclusive there, too.
    try:
        os.link(source, target)
    except FileExistsError:
        # An NFS client repeats a call whose reply was lost, and then finds its own link.
        if not _is_one_file(source, target):
            raise file_exists(target) from None
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        _warn_of_races(target, "neither exclusive renames nor hard links")
        if os.path.lexists(target):
            raise file_exists(target) from None
        os.replace(source, target)  # noqa: PTH105
        return
    os.unlink(source)  # noqa: PTH108


def _is_one_file(source: str, target: str) -> bool:
    """Return whether two names refer to the same file; symbolic links are not followed."""
    found = [os.stat(path, follow_symlinks=False) for path in (source, target)]  # noqa: PTH116
    return found[0].st_ino == found[1].st_ino and found[0].st_dev == found[1].st_dev


def rename_if_matching(source: str, target: str, version: str) -> None:
    """Rename a file over `target` if `target` has the given version.

    Raises:
        PreconditionFailed: `target` has another version, or does not exist.
        TimeoutError: Another process holds the lock for too long.
    """
    with _locked(target, version):
        try:
            found = version_of(os.stat(target))  # noqa: PTH116
        except FileNotFoundError:
            raise version_changed(target, version, None) from None
        if found != version:
            raise version_changed(target, version, found)
        os.replace(source, target)  # noqa: PTH105


@contextmanager
def _locked(path: str, version: str) -> Iterator[None]:
    """Hold the lock on a file inside the block, if its file system supports locks."""
    try:
        file = _lockable(path)
    except FileNotFoundError:
        raise version_changed(path, version, None) from None
    with file:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    what = f"another process has locked it for more than {_LOCK_SECONDS:g} s"
                    raise TimeoutError(errno.ETIMEDOUT, what, path) from None
                time.sleep(_POLL_SECONDS)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                _warn_of_races(path, "no file locks")
                break
        yield


def _lockable(path: str) -> Descriptor:
    """Open a file to lock it, for writing if possible, because NFS requires that."""
    try:
        return opened(path, os.O_RDWR | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
    return opened(path, os.O_RDONLY | os.O_NONBLOCK)


def _warn_of_races(path: str, lack: str) -> None:
    """Warn that two concurrent commits may both succeed on this file system."""
    _log.warning(
        "%s: this file system has %s, so two saves that commit at the same instant may both "
        "succeed; let only one job write here",
        path,
        lack,
    )
