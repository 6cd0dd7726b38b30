"""Reads past the page cache: what is not in it comes from the disk at the disk's own speed."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep import settings
from shardkeep.plan.memory_budget import MemoryBudget
from shardkeep.settings import PAGE
from shardkeep.stores.local import syscalls
from shardkeep.stores.local.buffers import after

__all__ = ["FLAG", "PIECE", "ColdReads"]

FLAG: int = getattr(os, "O_DIRECT", 0)
"""How to open a file for such reads; 0 where there are none."""

PIECE = 4 << 20
"""Bytes of one read at most."""

_MIN_READ_BYTES = 64 * 1024
"""Fewer bytes are not worth a look: the kernel's own reading ahead may well serve the next ones."""

_SAMPLE_BYTES = 32 * 1024

_REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EFAULT)
"""What such a read says of a file system, or of memory, that does not take it."""

Bytes = NDArray[Any]


class ColdReads:
    """The buffers of one store, and whether its file system takes such reads at all.

    That is found out by trying: after the first refusal there are no more of them. All buffers of
    a store together take half of `budget` bytes at most (the other half is its callers'), by
    default of `knobs.host_budget()`.
    """

    def __init__(self, wanted: bool = True, budget: int | None = None) -> None:
        self._budget = budget
        self.works = wanted and bool(FLAG)
        self._lock = Lock()
        self._free: list[mmap.mmap] = []
        self._taken = 0

    def pays(self, fd: int, offset: int, length: int) -> bool:
        """Whether a range, by a sample, has to come from the disk.

        The sample is taken from the middle: reading ahead leaves the beginning cached, and to ask
        for all pages of a range takes a twentieth of the time that copying them takes.
        """
        if not self.works or length < _MIN_READ_BYTES:
            return False
        found = syscalls.cached(fd, offset + (length - _SAMPLE_BYTES) // 2, _SAMPLE_BYTES)
        if found is None:
            self.works = False
            return False
        return found < _SAMPLE_BYTES // 2

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """A refusal inside ends direct reads, but is no error."""
        try:
            yield
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            self.works = False

    def read(self, fd: int, offset: int, view: memoryview, step: int) -> Iterator[int]:
        """Fill `view`, of `PIECE` bytes at most, from `offset` of a file opened with `FLAG`.

        Where it lies as far past a page as its bytes do in the file (so `plan.layout` lays them),
        nothing is copied but what is before its first page and behind its last one.

        Yields how many of its bytes are there, every `step` or less. Ends early where the file
        does, where such reads are refused, or if all buffers are taken: an ordinary read then
        goes on from there.
        """
        with self._buffer() as buffer:
            if buffer is None:
                return
            target, space = (np.frombuffer(each, dtype=np.uint8) for each in (view, buffer))
            if (target.ctypes.data - offset) % PAGE == 0:
                yield from self._in_place(fd, offset, target, space, step)
            else:
                yield from self._copied(fd, offset, target, space, step)

    def _in_place(
        self, fd: int, offset: int, target: Bytes, space: Bytes, step: int
    ) -> Iterator[int]:
        """Read whole pages to where they belong; `space` takes the torn ones at the ends."""
        length, before = len(target), offset % PAGE
        low = -offset % PAGE  # the whole pages of the target
        high = length - (length - low) % PAGE
        head, tail = space[:PAGE], space[PAGE : 2 * PAGE]
        parts = [head.data] if before else []
        parts += [target[low:high].data, *([tail.data] if high < length else [])]
        end = min(self._fill(fd, offset - before, parts) - before, length)
        target[:low] = head[PAGE - low :]
        target[high:] = tail[: length - high]
        for done in range(step, end + step, step):
            yield min(done, end)

    def _copied(
        self, fd: int, offset: int, target: Bytes, space: Bytes, step: int
    ) -> Iterator[int]:
        """Read to `space`, and copy from there."""
        room = len(space) - PAGE
        for at in range(0, len(target), room):
            stop = min(at + room, len(target))
            first = (offset + at) % PAGE
            length = first + stop - at
            there = self._fill(fd, offset + at - first, [space[: length + -length % PAGE].data])
            end, source = there - first, space[first:]
            for begin in range(0, min(end, stop - at), step):
                # numpy's copies let other threads run; those between memoryviews do not.
                done = min(begin + step, end, stop - at)
                target[at + begin : at + done] = source[begin:done]
                yield at + done
            if end < stop - at:
                return

    def close(self) -> None:
        """Give the buffers back to the system."""
        with self._lock:
            self._taken -= len(self._free)
            self._free.clear()

    def _fill(self, fd: int, offset: int, parts: Sequence[memoryview]) -> int:
        """Bytes read, from a page on into parts that are whole pages: all, unless the file ends."""
        done = 0
        with self.refusals():
            while parts and done % PAGE == 0:
                read = os.preadv(fd, parts, offset + done)
                if not read:
                    break
                parts, done = after(parts, read), done + read
        return done

    @contextmanager
    def _buffer(self) -> Iterator[mmap.mmap | None]:
        buffer = self._take()
        try:
            yield buffer
        finally:
            if buffer is not None:
                with self._lock:
                    self._free.append(buffer)

    def _take(self) -> mmap.mmap | None:
        """A buffer out of the pool, or a new one; None if there are as many as may be."""
        with self._lock:
            if self._free:
                return self._free.pop()
            budget = MemoryBudget.of(self._budget)
            size = budget.direct_buffer_bytes(settings.read_threads(), PIECE)
            if size < _MIN_READ_BYTES or (self._taken + 1) * size > budget.direct_read_bytes():
                return None
            self._taken += 1
        # Private: a forked process must not write into its parent's buffers.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        return mmap.mmap(-1, size + PAGE, flags=flags)
