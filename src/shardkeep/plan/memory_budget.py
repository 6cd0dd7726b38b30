"""How the buffers of one save or load share the host memory that it may take."""

from __future__ import annotations

from dataclasses import dataclass

from shardkeep import settings
from shardkeep.plan.file_layout import MIN_WINDOW_BYTES
from shardkeep.settings import BLOCK, PAGE

__all__ = ["MemoryBudget"]

_MAX_WINDOW_BYTES = 16 << 20
"""Size limit of one write. A busy interpreter delays a thread once per write, so few are better."""

_MIN_READ_BYTES = 4 * BLOCK
"""Smallest read buffer: a small run fits in, rounded out to whole blocks on both sides."""

_MAX_READ_BYTES = 4 << 20
"""Largest read buffer: its bytes should still be in a cache when they are copied."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """The shares of one memory budget.

    A save first stages its payloads if it is asynchronous, then divides what is left over the
    windows of its writing threads. A load gives one half to the store, for its direct reads, and
    the other one to the buffers of its reading threads. Bytes that cannot be read to where they
    belong pass through memory that is taken from both halves.

    Attributes:
        nbytes: bytes in all.
        limits_staging: whether the copy of an asynchronous save must fit in, too. By default it may
            take as much memory as the payloads have.
    """

    nbytes: int
    limits_staging: bool = True

    @staticmethod
    def of(max_host_memory: int | None) -> MemoryBudget:
        """Return the budget of a call; None stands for `SHARDKEEP_MAX_HOST_MEMORY_BYTES`."""
        if max_host_memory is None:
            return MemoryBudget(settings.max_host_memory_bytes(), limits_staging=False)
        return MemoryBudget(int(max_host_memory))

    def can_stage(self, nbytes: int) -> bool:
        """Return whether payloads of so many bytes can be staged, and a window still fits."""
        return not self.limits_staging or nbytes + MIN_WINDOW_BYTES <= self.nbytes

    def after_staging(self, nbytes: int) -> MemoryBudget:
        """Return what is left for windows once so many bytes are staged."""
        return MemoryBudget(self.nbytes - nbytes) if self.limits_staging else self

    def shared_by(self, count: int) -> MemoryBudget:
        """Return the share of each of `count` parts of the work that go on at the same time."""
        return MemoryBudget(self.nbytes // max(1, count))

    def write_threads(self, wanted: int) -> int:
        """Return how many of the wanted threads can have a window each; at least 1."""
        return max(1, min(wanted, self.nbytes // MIN_WINDOW_BYTES))

    def window_bytes(self, threads: int) -> int:
        """Return the size limit of a window where each of these threads has one."""
        share = self.nbytes // max(1, threads) // PAGE * PAGE
        return max(MIN_WINDOW_BYTES, min(share, _MAX_WINDOW_BYTES))

    def direct_read_bytes(self) -> int:
        """Return what the buffers of a store's direct reads may take in all."""
        return self.nbytes // 2

    def direct_buffer_bytes(self, threads: int, most: int) -> int:
        """Return the size of one buffer for direct reads: whole pages, `most` bytes at most."""
        return min(most, self.direct_read_bytes() // max(1, threads)) // PAGE * PAGE

    def read_buffer_bytes(self, threads: int) -> int:
        """Return the size of each reading thread's buffer: whole blocks.

        All of them together take at most half of the budget, but 1 MiB per thread at least.
        """
        share = self.nbytes // 2 // max(1, threads) // BLOCK * BLOCK
        return max(_MIN_READ_BYTES, min(_MAX_READ_BYTES, share))

    def round_bytes(self) -> int:
        """Return the memory for bytes that cannot be read to where they belong: whole blocks."""
        return max(1, self.nbytes // 4 // BLOCK) * BLOCK

    def after_rounds(self, round_bytes: int) -> MemoryBudget:
        """Return the budget for reads beside rounds of so many bytes.

        Twice as much is taken off, since the store takes half of what is left without knowing of
        the rounds.
        """
        return MemoryBudget(max(0, self.nbytes - 2 * round_bytes))

    def slab_bytes(self) -> int:
        """Return the size limit of a slab of a conversion.

        A slab, the buffers that it is read with, and a window of the output are in memory at a
        time: each takes a quarter of the budget at most.
        """
        return max(1, self.nbytes // 4)

    def slab_read_bytes(self) -> int:
        """Return the budget of the reads that fill a slab."""
        return self.nbytes // 4

    def slab_window_bytes(self) -> int:
        """Return the size limit of a window of a conversion's output."""
        return MemoryBudget(self.nbytes // 4).window_bytes(1)
