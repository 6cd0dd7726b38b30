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

__all__ = ["Allocate", "Arena", "allocate_huge_pages", "allocate_pages", "copy_memory", "memory_at"]

_view: Any = ctypes.pythonapi.PyMemoryView_FromMemory
_view.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_view.restype = ctypes.py_object
_READ, _WRITE = 0x100, 0x200  # PyBUF_READ, PyBUF_WRITE

# Called through a library, memcpy releases the interpreter lock; ctypes.memmove does not.
_memcpy: Any = ctypes.CDLL(None).memcpy
_memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcpy.restype = None

_SHORT_COPY_BYTES = 64 * 1024
"""Up to this size, copying with the interpreter lock held is faster than taking it back."""


def copy_memory(target: int, source: int, nbytes: int) -> None:
    """Copy bytes from one address to another. The ranges must not overlap."""
    if nbytes <= _SHORT_COPY_BYTES:
        ctypes.memmove(target, source, nbytes)
    else:
        _memcpy(target, source, nbytes)


def memory_at(address: int, nbytes: int, *, write: bool = False) -> memoryview:
    """What lies there, to be read, or written to. It is for the caller to keep it alive meanwhile.

    Only what is asked of the view is looked at.
    """
    view: memoryview = _view(address, nbytes, _WRITE if write else _READ)
    return view


def allocate_pages(nbytes: int) -> NDArray[np.uint8]:
    """New memory that starts at a page, as direct I/O wants it; freed with the array."""
    return np.frombuffer(_mapped(nbytes), dtype=np.uint8, count=nbytes)


def allocate_huge_pages(nbytes: int) -> NDArray[np.uint8]:
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
        self._memory: NDArray[np.uint8] = allocate_pages(0)
        self._made_by: Allocate = allocate_huge_pages

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self._memory.nbytes

    def take(self, nbytes: int, allocate: Allocate = allocate_huge_pages) -> NDArray[np.uint8]:
        """Page-aligned memory with undefined content; what was taken before is not valid any more.

        Args:
            nbytes: how much.
            allocate: allocates new memory if the present block is too small, or was allocated by
                another function. Any block will do in place of one of `allocate_huge_pages`.

        Raises:
            MemoryError, OSError: there is not so much.
        """
        with self._lock:
            if nbytes > self.nbytes or (
                nbytes and allocate not in (allocate_huge_pages, self._made_by)
            ):
                self._drop()  # first, or both would be there at once
                self._memory, self._made_by = allocate(nbytes), allocate
            return self._memory[:nbytes]

    def release(self) -> None:
        """Give the memory back to the system, as soon as nothing uses it."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        self._memory, self._made_by = allocate_pages(0), allocate_huge_pages
