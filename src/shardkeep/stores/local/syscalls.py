"""Linux system calls that Python does not provide."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from typing import Any

__all__ = ["allocate", "cached", "rename_new"]

_CACHESTAT = 451
"""Linux 6.5 or later; recent calls have the same number on all architectures except Alpha."""

_UNABLE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_Range = ctypes.c_uint64 * 2
_Counts = ctypes.c_uint64 * 5


def _function(name: str) -> Any:
    """Return a function of the C library on Linux; None on other systems."""
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
    """Return how many bytes of a file's range are in the page cache, in whole pages.

    The call does not read any page or mark it as used. The result is None if the kernel does not
    provide the number (an old kernel, a sandbox, a file system without a page cache).
    """
    if _call is None or length <= 0:  # the call takes a length of 0 as up to the end
        return None
    counts = _Counts()
    where = _Range(offset, length)
    if _call(_CACHESTAT, ctypes.c_int(fd), ctypes.byref(where), ctypes.byref(counts), 0):
        return None
    return int(counts[0]) * mmap.PAGESIZE


def allocate(fd: int, nbytes: int) -> None:
    """Reserve space for a file, if the file system supports that.

    `os.posix_fallocate` would instead write a byte into each block, which is very slow over a
    network.

    Raises:
        OSError: There is not enough space, or another error.
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
