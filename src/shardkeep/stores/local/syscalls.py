"""System calls of Linux that Python has no name for."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from typing import Any

__all__ = ["allocate", "cached", "rename_new"]

_CACHESTAT = 451
"""Linux 6.5 and later; newer calls have one number on all architectures (but Alpha)."""

_UNABLE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_Range = ctypes.c_uint64 * 2
_Counts = ctypes.c_uint64 * 5


def _function(name: str) -> Any:
    """A function of the C library of Linux; None elsewhere."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


_call = _function("syscall")
if _call is not None:
    _call.restype = ctypes.c_long
_fallocate = _function("fallocate64")
_renameat2 = _function("renameat2")
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


def cached(fd: int, offset: int, length: int) -> int | None:
    """Bytes of a file's range that are in the page cache, in whole pages.

    Asking changes nothing: no page is read, and none counts as used. None if the kernel does not
    say (an older one, a sandbox, a file system without a page cache).
    """
    if _call is None or length <= 0:  # for the call, a length of 0 goes to the end of the file
        return None
    counts = _Counts()
    where = _Range(offset, length)
    if _call(_CACHESTAT, ctypes.c_int(fd), ctypes.byref(where), ctypes.byref(counts), 0):
        return None
    return int(counts[0]) * mmap.PAGESIZE


def allocate(fd: int, nbytes: int) -> None:
    """Set space aside for a file; where the file system can't, nothing happens.

    `os.posix_fallocate` would write a byte into each block there: over a network that takes ages.

    Raises:
        OSError: there is not so much space.
    """
    if _fallocate is None or not nbytes:
        return
    while _fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)):
        number = ctypes.get_errno()
        if number in _UNABLE:
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def rename_new(source: str, target: str) -> bool:
    """Rename a file unless `target` exists, in one step.

    Returns:
        False if the system or the file system cannot do that; nothing has changed then.

    Raises:
        FileExistsError: `target` exists.
        OSError: The rename failed for another reason.
    """
    if _renameat2 is None:
        return False
    paths = os.fsencode(source), os.fsencode(target)
    while _renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], ctypes.c_uint(_RENAME_NOREPLACE)):
        number = ctypes.get_errno()
        if number in _UNABLE:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number), source, None, target)
    return True
