"""Payloads copied out of the caller's way: what is saved from there can't change any more."""

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

_JOB = 8 << 20
"""Bytes that a thread copies before it looks for more: all threads end at about the same time."""

_JOB_LIGHT = 1024
"""Light payloads that it copies before it looks for more."""


class StagingLayout:
    """Where each of N payloads goes in memory that starts at a page.

    Large ones lie as far past a page as where they come from: so they do in files, too
    (`plan.layout`), and can be written without another copy.

    Args:
        payloads: what to copy.
        nbytes: [N] bytes of each.
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
        """[N] the byte of the memory at which each begins."""
        self.nbytes = int(room.sum())
        """Bytes of memory that it takes."""


class StagedPayloads(Payloads):
    """Payloads that have been copied to memory where nothing changes them.

    Args:
        memory: where they are; it lasts as long as this does.
        places: of each.
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
        # Without giving up the interpreter's lock, which a busy caller keeps for milliseconds.
        ctypes.memmove(address, self._addresses[row] + start, nbytes)

    def checksums(self, row: int, start: int, nbytes: int, address: int) -> list[int]:
        """CRC-32 of each block of some bytes of a payload, as taken when it was copied; of those of
        more than `LIGHT_BYTES` bytes (`io.write.windows.BlockChecksums`).
        """
        first = self._first[row] + start // BLOCK
        return self._checksums[first : first + -(-nbytes // BLOCK)]

    def receive(self, payloads: Payloads, row: int, start: int, stop: int) -> None:
        """Copy bytes of a payload to here, in steps that are in the cache for their digests."""
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
    """Copy payloads.

    Args:
        payloads: what to copy; not looked at any more when this returns.
        places: of these payloads.
        memory: page-aligned, at least `places.nbytes` bytes.
        threads: how many copy.

    Raises: whatever the payloads raise.
    """
    staged = StagedPayloads(memory, places)

    def worker(mine: Iterator[Sequence[tuple[int, int, int]]]) -> None:
        for job in mine:
            for row, start, stop in job:
                staged.receive(payloads, row, start, stop)

    parallel(_jobs(places.sizes), worker, threads)
    return staged


def _jobs(sizes: I64) -> list[list[tuple[int, int, int]]]:
    """What there is to copy: rows, and which bytes of them."""
    heavy, light = (
        np.flatnonzero(sizes > LIGHT_BYTES),
        np.flatnonzero((sizes > 0) & (sizes <= LIGHT_BYTES)),
    )
    jobs = []
    for row, size in zip(heavy.tolist(), sizes[heavy].tolist(), strict=True):
        jobs += [[(row, at, min(at + _JOB, size))] for at in range(0, size, _JOB)]
    for first in range(0, len(light), _JOB_LIGHT):
        rows = light[first : first + _JOB_LIGHT]
        ends = sizes[rows].tolist()
        jobs.append([(row, 0, end) for row, end in zip(rows.tolist(), ends, strict=True)])
    return jobs
