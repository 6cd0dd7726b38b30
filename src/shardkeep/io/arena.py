"""Memory that is taken once and used again: what async saves are staged in."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Allocate", "Arena", "aligned", "memory_at", "roomy"]

_view: Any = ctypes.pythonapi.PyMemoryView_FromMemory
_view.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_view.restype = ctypes.py_object
_READ, _WRITE = 0x100, 0x200  # PyBUF_READ, PyBUF_WRITE


def memory_at(address: int, nbytes: int, *, write: bool = False) -> memoryview:
    """What lies there, to be read, or written to. It is for the caller to keep it alive meanwhile.

    Only what is asked of the view is looked at.
    """
    view: memoryview = _view(address, nbytes, _WRITE if write else _READ)
    return view


def aligned(nbytes: int) -> NDArray[np.uint8]:
    """New memory that starts at a page, as direct I/O wants it; freed with the array."""
    return np.frombuffer(_mapped(nbytes), dtype=np.uint8, count=nbytes)


def roomy(nbytes: int) -> NDArray[np.uint8]:
    """The same, in huge pages where the system has them: 512 times fewer to touch at first."""
    block = _mapped(nbytes)
    with suppress(OSError, AttributeError):
        block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, dtype=np.uint8, count=nbytes)


def _mapped(nbytes: int) -> mmap.mmap:
    # Private: a forked process must not write into it, and only such memory gets huge pages.
    return mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


Allocate = Callable[[int], NDArray[np.uint8]]
"""Gives new page-aligned memory: so many bytes."""


class Arena:
    """One block of memory, for one save at a time. Its pages are touched by its first use only.

    Threads may take and release at the same time: what was taken is there as long as it is used.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._memory: NDArray[np.uint8] = aligned(0)
        self._made_by: Allocate = roomy

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self._memory.nbytes

    def take(self, nbytes: int, allocate: Allocate = roomy) -> NDArray[np.uint8]:
        """Page-aligned memory with undefined content; what was taken before is not valid any more.

        Args:
            nbytes: how much.
            allocate: gives new memory where what there is does not suffice: it is too small, or
                something else than this gave it. What `roomy` gives, any other memory will do for.

        Raises:
            MemoryError, OSError: there is not so much.
        """
        with self._lock:
            if nbytes > self.nbytes or (nbytes and allocate not in (roomy, self._made_by)):
                self._drop()  # first, or both would be there at once
                self._memory, self._made_by = allocate(nbytes), allocate
            return self._memory[:nbytes]

    def release(self) -> None:
        """Give the memory back to the system, as soon as nothing uses it."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        self._memory, self._made_by = aligned(0), roomy
