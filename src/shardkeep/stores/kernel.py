"""System calls of Linux that Python has no name for."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

__all__ = ["cached"]

_CACHESTAT = 451
"""Linux 6.5 and later; newer calls have one number on all architectures (but Alpha)."""

_Range = ctypes.c_uint64 * 2
_Counts = ctypes.c_uint64 * 5


def _syscall() -> Any:
    if sys.platform != "linux":
        return None
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    return call


_call = _syscall()


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
