"""Staging: payloads are copied to memory that the caller cannot change while they are saved."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from shardkeep.io.checksums import crc32_blocks
from shardkeep.io.contract import Payloads
from shardkeep.io.pool import parallel
from shardkeep.io.write.windows import LIGHT_BYTES, STEP_BYTES
from shardkeep.plan.file_layout import MIN_IN_PLACE_BYTES
from shardkeep.settings import ALIGNMENT, BLOCK, PAGE
from shardkeep.types import I64

__all__ = ["StagedPayloads", "StagingLayout", "stage_payloads"]

_JOB_BYTES = 8 << 20
"""Size of a copy job: small enough that all threads end at about the same time."""

_LIGHT_PAYLOADS_PER_JOB = 1024
"""Number of light payloads in a copy job."""


class StagingLayout:
    """Offsets of N payloads in staging memory, which starts at a page.

    Large payloads start as many bytes past a page as in their own memory. They do so in files, too
    (`plan.file_layout`), so they can be written without another copy.

    Args:
        payloads: what to copy.
        nbytes: [N] bytes of each payload.
    """

    def __init__(self, payloads: Payloads, nbytes: I64) -> None:
        large = nbytes >= MIN_IN_PLACE_BYTES
        past = np.zeros_like(nbytes)
        past[large] = payloads.addresses[large] % PAGE
        past[past % ALIGNMENT != 0] = 0
        unit = np.where(large, PAGE, ALIGNMENT)
        room = -(-(past + nbytes) // unit) * unit
        order = np.argsort(~large, kind="stable")
        ends = np.cumsum(room[order])
        starts = np.empty_like(nbytes)
        starts[order] = ends - room[order] + past[order]
        self.sizes = nbytes
        """[N] bytes of each payload."""
        self.starts = starts
        """[N] offset of each payload in the memory."""
        self.nbytes = int(room.sum())
        """Bytes of memory in all."""


class StagedPayloads(Payloads):
    """Payloads that have been copied to staging memory.

    Args:
        memory: the staging memory, which this object keeps alive.
        places: the offsets of the payloads.
    """

    def __init__(self, memory: NDArray[np.uint8], places: StagingLayout) -> None:
        self._memory = memory
        self.addresses = memory.ctypes.data + places.starts
        self._addresses: list[int] = self.addresses.tolist()
        self._sizes: list[int] = places.sizes.tolist()
        blocks = np.cumsum(-(-places.sizes // BLOCK))
        self._first: list[int] = [0, *blocks.tolist()]
        self._checksums = [0] * self._first[-1]

    def copy(self, row: int, start: int, nbytes: int, address: int) -> None:
        # Keeps the interpreter lock: a busy caller would take it for milliseconds.
        ctypes.memmove(address, self._addresses[row] + start, nbytes)

    def checksums(self, row: int, start: int, nbytes: int, address: int) -> list[int]:
        """Return the block checksums of a range of a payload, which were computed by the copy.

        They exist for payloads above `LIGHT_BYTES` only. A `BlockChecksums` of `io.write.windows`.
        """
        first = self._first[row] + start // BLOCK
        return self._checksums[first : first + -(-nbytes // BLOCK)]

    def receive(self, payloads: Payloads, row: int, start: int, stop: int) -> None:
        """Copy a range of a payload to staging memory, and checksum each step in the cache."""
        here, light = self._addresses[row], self._sizes[row] <= LIGHT_BYTES
        for at in range(start, stop, STEP_BYTES):
            nbytes = min(STEP_BYTES, stop - at)
            payloads.copy(row, at, nbytes, here + at)
            if not light:
                found = crc32_blocks(here + at, nbytes)
                first = self._first[row] + at // BLOCK
                self._checksums[first : first + len(found)] = found


def stage_payloads(
    payloads: Payloads, places: StagingLayout, memory: NDArray[np.uint8], *, threads: int
) -> StagedPayloads:
    """Copy payloads to staging memory, with checksums.

    Any error of the payloads is raised as it is.

    Args:
        payloads: what to copy. They are not read any more once this returns.
        places: offsets of these payloads.
        memory: page-aligned memory of at least `places.nbytes` bytes.
        threads: number of threads that copy.
    """
    staged = StagedPayloads(memory, places)

    def worker(mine: Iterator[Sequence[tuple[int, int, int]]]) -> None:
        for job in mine:
            for row, start, stop in job:
                staged.receive(payloads, row, start, stop)

    parallel(_jobs(places.sizes), worker, threads)
    return staged


def _jobs(sizes: I64) -> list[list[tuple[int, int, int]]]:
    """Return the copy jobs: lists of a row, and the first byte and the end of a range of it."""
    heavy, light = (
        np.flatnonzero(sizes > LIGHT_BYTES),
        np.flatnonzero((sizes > 0) & (sizes <= LIGHT_BYTES)),
    )
    jobs = []
    for row, size in zip(heavy.tolist(), sizes[heavy].tolist(), strict=True):
        jobs += [[(row, at, min(at + _JOB_BYTES, size))] for at in range(0, size, _JOB_BYTES)]
    for first in range(0, len(light), _LIGHT_PAYLOADS_PER_JOB):
        rows = light[first : first + _LIGHT_PAYLOADS_PER_JOB]
        ends = sizes[rows].tolist()
        jobs.append([(row, 0, end) for row, end in zip(rows.tolist(), ends, strict=True)])
    return jobs
