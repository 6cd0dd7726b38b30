"""Direct reads (O_DIRECT) of data that is not in the page cache, at the speed of the disk."""

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
"""Flag that opens a file for direct reads; 0 if the system does not support them."""

PIECE = 4 << 20
"""Maximum number of bytes of one read."""

_MIN_READ_BYTES = 64 * 1024
"""Shorter reads are not tested, since the kernel's read-ahead is likely to serve the next ones."""

_SAMPLE_BYTES = 32 * 1024

_REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EFAULT)
"""Errors of a direct read that a file system, or the memory that is read into, does not support."""

Bytes = NDArray[Any]


class ColdReads:
    """Direct reads of one store: its buffers, and whether its file system supports such reads.

    Support is detected by trying: after the first refusal there are no further direct reads. All
    buffers of a store together take at most half of the budget; the other half belongs to the
    callers.

    Args:
        wanted: Whether to read directly at all.
        budget: Memory limit in bytes; by default the setting SHARDKEEP_MAX_HOST_MEMORY_BYTES.
    """

    def __init__(self, wanted: bool = True, budget: int | None = None) -> None:
        self._budget = budget
        self.works = wanted and bool(FLAG)
        self._lock = Lock()
        self._free: list[mmap.mmap] = []
        self._taken = 0

    def pays(self, fd: int, offset: int, length: int) -> bool:
        """Return whether a sample of a range is not in the page cache, so that direct reads pay.

        The sample is taken from the middle, because read-ahead leaves the beginning in the cache.
        Testing all pages of a range would take a twentieth of the time of copying them.
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
        """Disable direct reads, without an error, if one is refused in the block."""
        try:
            yield
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            self.works = False

    def read(self, fd: int, offset: int, view: memoryview, step: int) -> Iterator[int]:
        """Fill `view`, of at most `PIECE` bytes, from a file that was opened with `FLAG`.

        If the address of `view` and `offset` have the same position within a page, only the
        incomplete pages at both ends are copied.

        Args:
            fd: Descriptor of the file.
            offset: Offset of the first byte in the file.
            view: Memory to read into.
            step: Maximum number of bytes between two numbers that are yielded.

        Yields:
            The number of bytes read so far. The last number is smaller than the length of `view` if
            the file ends, if direct reads are refused, or if all buffers are in use. An ordinary
            read then continues from there.
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
        """Read whole pages into the target; `space` takes the incomplete pages at both ends."""
        length, before = len(target), offset % PAGE
        low = -offset % PAGE  # start of the whole pages in the target
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
        """Read into `space`, and copy from there."""
        room = len(space) - PAGE
        for at in range(0, len(target), room):
            stop = min(at + room, len(target))
            first = (offset + at) % PAGE
            length = first + stop - at
            there = self._fill(fd, offset + at - first, [space[: length + -length % PAGE].data])
            end, source = there - first, space[first:]
            for begin in range(0, min(end, stop - at), step):
                # numpy releases the GIL while it copies; a memoryview does not.
                done = min(begin + step, end, stop - at)
                target[at + begin : at + done] = source[begin:done]
                yield at + done
            if end < stop - at:
                return

    def close(self) -> None:
        """Free the buffers."""
        with self._lock:
            self._taken -= len(self._free)
            self._free.clear()

    def _fill(self, fd: int, offset: int, parts: Sequence[memoryview]) -> int:
        """Read into whole pages, from a page boundary on; return the number of bytes read."""
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
        """Return a pooled or new buffer; None if the budget allows no more."""
        with self._lock:
            if self._free:
                return self._free.pop()
            budget = MemoryBudget.of(self._budget)
            size = budget.direct_buffer_bytes(settings.read_threads(), PIECE)
            if size < _MIN_READ_BYTES or (self._taken + 1) * size > budget.direct_read_bytes():
                return None
            self._taken += 1
        # Private, so that a forked process does not write into its parent's buffers.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        return mmap.mmap(-1, size + PAGE, flags=flags)
