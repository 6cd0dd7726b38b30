"""Memory that is used again is large enough and of the requested kind."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np

from shardkeep.io import arena as module
from shardkeep.io.arena import Arena, allocate_huge_pages, allocate_pages


def pinned(nbytes):
    return allocate_pages(nbytes)


def test_memory_is_kept_until_it_is_too_small_or_released():
    arena = Arena()
    assert arena.nbytes == 0
    first = arena.take(5000)
    assert (first.nbytes, arena.nbytes, first.ctypes.data % 4096) == (5000, 5000, 0)
    assert arena.take(100).ctypes.data == first.ctypes.data
    assert arena.take(6000).nbytes == arena.nbytes == 6000
    arena.release()
    assert arena.nbytes == 0
    first[:] = 1  # still valid, as the array exists


def test_old_memory_is_freed_before_new_memory_is_allocated():
    arena, held = Arena(), []

    def watched(nbytes):
        gc.collect()
        held.extend(known() is not None for known in made)
        memory = allocate_pages(nbytes)
        made.append(weakref.ref(memory))
        return memory

    made = []
    for nbytes in (10, 20, 30):
        arena.take(nbytes, watched)
    assert held == [False] * 3


def test_unpinned_memory_is_replaced_if_pinned_memory_is_requested():
    """For example, a state moved from the CPU to a device, or an empty state was saved first."""
    arena, asked = Arena(), []

    def pin(nbytes):
        asked.append(nbytes)
        return pinned(nbytes)

    arena.take(5000)
    arena.take(100, pin)
    assert asked == [100]
    address = arena.take(80, pin).ctypes.data
    assert arena.take(90, allocate_huge_pages).ctypes.data == address, (
        "pinned memory does for anything"
    )
    assert arena.take(0, pinned).nbytes == 0
    assert arena.take(100, pin).ctypes.data == address
    assert asked == [100]


def test_a_concurrent_release_does_not_affect_memory_being_taken():
    """`release_memory` on another thread must not leave the caller with too little memory."""
    allocating = threading.Event()
    thread = threading.Thread(target=lambda: allocating.wait(10) and arena.release())
    thread.start()

    class Interrupted(Arena):
        """An arena that another thread releases as soon as its new memory exists."""

        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "_memory" and value.nbytes:
                allocating.set()
                thread.join(0.5)  # a timeout: it may have to wait for this thread

    arena = Interrupted()
    assert arena.take(5000).nbytes == 5000
    thread.join()


def test_large_memory_is_usable(monkeypatch):
    class NoHugePages(module.mmap.mmap):
        def madvise(self, *_):
            raise OSError("not here")

    monkeypatch.setattr(module.mmap, "mmap", NoHugePages)
    memory = allocate_huge_pages(10_000)
    memory[:] = 7
    assert np.all(memory == 7)
