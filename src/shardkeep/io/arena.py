"""Page-aligned memory, and an arena that asynchronous saves reuse for staging."""

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
    """Return a view of memory at an address. The caller must keep the memory alive meanwhile."""
    view: memoryview = _view(address, nbytes, _WRITE if write else _READ)
    return view


def allocate_pages(nbytes: int) -> NDArray[np.uint8]:
    """Allocate memory that starts at a page, as direct I/O demands; it is freed with the array."""
    return np.frombuffer(_mapped(nbytes), dtype=np.uint8, count=nbytes)


def allocate_huge_pages(nbytes: int) -> NDArray[np.uint8]:
    """Allocate page-aligned memory in huge pages, if the system has them.

    The first use of memory costs time for each page, and there are 512 times fewer.
    """
    block = _mapped(nbytes)
    with suppress(OSError, AttributeError):
        block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, dtype=np.uint8, count=nbytes)


def _mapped(nbytes: int) -> mmap.mmap:
    # Private, so that a forked process cannot write into it. Only such memory gets huge pages.
    return mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


Allocate = Callable[[int], NDArray[np.uint8]]
"""Allocates page-aligned memory of a number of bytes."""


class Arena:
    """One block of memory for one save at a time; only its first use costs time for new pages.

    Several threads can call `take` and `release` at a time. Memory that was taken stays valid as
    long as its array exists.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._memory: NDArray[np.uint8] = allocate_pages(0)
        self._made_by: Allocate = allocate_huge_pages

    @property
    def nbytes(self) -> int:
        """Size of the block."""
        return self._memory.nbytes

    def take(self, nbytes: int, allocate: Allocate = allocate_huge_pages) -> NDArray[np.uint8]:
        """Return page-aligned memory with undefined content: that of the last call, if it fits.

        Args:
            nbytes: how many bytes.
            allocate: allocates new memory if the present block is too small, or was allocated by
                another function. Any block will do in place of one of `allocate_huge_pages`.

        Raises:
            MemoryError, OSError: there is not enough memory.
        """
        with self._lock:
            if nbytes > self.nbytes or (
                nbytes and allocate not in (allocate_huge_pages, self._made_by)
            ):
                self._drop()  # first, or both would exist at once
                self._memory, self._made_by = allocate(nbytes), allocate
            return self._memory[:nbytes]

    def release(self) -> None:
        """Return the memory to the system as soon as no array uses it."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        self._memory, self._made_by = allocate_pages(0), allocate_huge_pages
