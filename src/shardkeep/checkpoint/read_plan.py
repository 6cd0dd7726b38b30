"""Requested boxes into memory: small payloads as columns, all else as one copy for each chunk.

The fast way takes only what is beyond doubt: what contradicts itself, or is not there, goes the
general way, which says what is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shardkeep import settings
from shardkeep.checkpoint.chunk_locations import ChunkLocations, PlainChunks
from shardkeep.io.arena import allocate_pages
from shardkeep.io.read.copies import ChunkCopy, ReadRound, ReadStats, read_copies
from shardkeep.io.read.small import (
    SmallPayloads,
    SmallRead,
    merge_small_reads,
    read_small,
    sorted_by_place,
)
from shardkeep.plan.memory_budget import MemoryBudget
from shardkeep.plan.overlap import Boxes, Overlap, first_element, one_run, overlap, sorted_unique
from shardkeep.plan.rounds import RoundPart, plan_rounds
from shardkeep.stores.contract import Store
from shardkeep.types import I64, ITEMSIZES, Box, Chunks, Index, Progress

__all__ = ["Memory", "ReadPlan", "plan"]

Mask = NDArray[np.bool_]


class Memory(Protocol):
    """Where boxes go, by their rows. It stays where it is for as long as this object lives."""

    def addresses(self, rows: I64) -> I64:
        """[R] where the memory of each of these rows begins; 0 where that does not say it all.

        Memory with an address holds the elements of the box in C order without gaps, each as wide
        as a stored one, and may be written to.
        """
        ...

    def array(self, row: int) -> NDArray[Any] | None:
        """An array for a whole box, to be filled as `io.jobs.Copy.into`. Asked for once a row.

        None where bytes can't be read to: they are `put` there.
        """
        ...

    def put(self, row: int, part: Box, data: NDArray[np.uint8]) -> None:
        """Take part of a box, whose elements `data` holds in C order, as they are stored.

        Args:
            part: relative to the box.
            data: is used again for something else.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ReadPlan:
    """What is to be read, and where it goes.

    Attributes:
        small: whole payloads for memory that has an address, and `reads`: how they are read.
        copies: all else that is read to where it belongs.
        rounds: what is not: it is put there, part by part. `room`: bytes of memory that this takes.
        resharded: [R] whether a box is put together from other boxes than itself. Large chunks that
            tile it run after run are itself: large boxes are cut like that when they are saved.
        memory: kept alive by this.
    """

    small: SmallPayloads
    reads: list[SmallRead]
    copies: list[ChunkCopy]
    rounds: list[ReadRound]
    room: int
    resharded: Mask
    memory: Memory

    def run(
        self,
        store: Store,
        *,
        verify: bool,
        threads: int,
        budget: int | None = None,
        progress: Progress | None = None,
    ) -> ReadStats:
        """Read everything, as `io.read.read_copies` does; it raises what that does."""
        told = _Told(progress, sum(read.high - read.low for read in self.reads))
        stats = read_copies(
            store,
            self.copies,
            self.rounds,
            verify=verify,
            threads=threads,
            budget=MemoryBudget.of(budget).after_rounds(self.room).nbytes,
            progress=told.copies,
        )
        nbytes = read_small(
            store,
            self.small,
            self.reads,
            verify=verify,
            threads=threads,
            progress=told.small,
        )
        open_ = self.small.crc < 0 if verify else np.ones(len(self.small.crc), dtype=np.bool_)
        rows = dict.fromkeys(self.small.tensor[open_].tolist())
        names = dict.fromkeys([*stats.unchecked, *(self.small.names[row] for row in rows)])
        return ReadStats(
            stats.bytes_read + nbytes,
            stats.bytes_needed + int(self.small.nbytes.sum()),
            tuple(names),
            stats.bytes_unchecked + int(self.small.nbytes[open_].sum()),
        )


class _Told:
    """Makes one progress of two: copies first, then so many bytes of small payloads."""

    def __init__(self, progress: Progress | None, later: int) -> None:
        self._progress, self._later, self._before = progress or _nobody, later, 0

    def copies(self, phase: str, done: int, total: int) -> None:
        self._before = total
        self._progress(phase, done, total + self._later)

    def small(self, phase: str, done: int, total: int) -> None:
        self._progress(phase, self._before + done, self._before + total)


def _nobody(phase: str, done: int, total: int) -> None:
    """Nobody listens."""


def plan(
    sources: ChunkLocations,
    wanted: Boxes,
    memory: Memory,
    *,
    threads: int,
    together: bool = False,
    budget: int | None = None,
) -> ReadPlan:
    """Decide how to read some boxes. Item headers are read where the index does not say enough.

    Args:
        wanted: [R] boxes; tensors count as in the index, and their chunks cover them.
        memory: where each of them goes.
        together: other ranks of this machine load at the same time. Whole tensors are what all of
            them want: those are read through the page cache, so that the disk is read once.
        budget: as of `ReadPlan.run`; a quarter of it is for what is not read to where it belongs.

    Raises:
        Damaged, FormatError: as from `ChunkLocations.locate`.
    """
    chunks = sources.index.chunks
    found = _meet(wanted, chunks)
    whole = (found.sizes == chunks.sizes[found.right]).all(axis=1)
    whole &= one_run(found.sizes, wanted.sizes[found.left])
    resharded = np.zeros(len(wanted.tensor), dtype=np.bool_)
    resharded[found.left[~(whole & _as_saved(wanted, found, sources.index))]] = True

    rows, place = np.unique(found.right, return_inverse=True)
    plain = sources.plain(rows, limit=settings.small_tensor_bytes(), threads=threads).take(place)
    fast = whole & (plain.start >= 0)
    asked = sorted_unique(found.left[fast])
    address = np.zeros(len(wanted.tensor), dtype=np.int64)
    address[asked] = memory.addresses(asked)
    fast &= address[found.left] > 0

    small = sorted_by_place(_small(sources, wanted, found, plain, address, np.flatnonzero(fast)))
    rest = np.flatnonzero(~fast)
    slow = np.ones(len(wanted.tensor), dtype=np.bool_)
    slow[found.left[fast]] = False
    slow[found.left[rest]] = True
    given = {row: memory.array(row) for row in np.flatnonzero(slow).tolist()}
    arrays = {row: array for row, array in given.items() if array is not None}
    around = np.array([row for row in given if row not in arrays], dtype=np.int64)
    shapes = sources.index.tensors.shape[wanted.tensor][:, : wanted.sizes.shape[1]]
    shared = together & (wanted.sizes == shapes).all(axis=1)
    rest = rest[~np.isin(found.left[rest], around)]
    copies = _copies(sources, wanted, found, rest, arrays, shared, threads)
    room = MemoryBudget.of(budget).round_bytes()
    rounds = _rounds(sources, wanted, around, memory, shared, threads, room)
    room = room if rounds else 0
    return ReadPlan(
        small,
        merge_small_reads(small, settings.read_gap_bytes()),
        copies,
        rounds,
        room,
        resharded,
        memory,
    )


def _rounds(
    sources: ChunkLocations,
    wanted: Boxes,
    rows: I64,
    memory: Memory,
    shared: Mask,
    threads: int,
    room: int,
) -> list[ReadRound]:
    """These of the wanted boxes, in parts that are read to so many bytes of memory, and put."""
    if not len(rows):
        return []
    groups = plan_rounds(_shapes(sources.index, wanted, rows), room)
    parts = [part for group in groups for part in group]
    space = allocate_pages(max((part.start + part.nbytes for part in parts), default=1))
    its_bytes = [space[part.start : part.start + part.nbytes] for part in parts]
    of = np.array([part.row for part in parts], dtype=np.int64)
    itemsizes = ITEMSIZES[sources.index.tensors.dtype[wanted.tensor[of]]].tolist()
    arrays = {
        at: data.view(f"V{itemsize}").reshape(part.inside.sizes)
        for at, (part, data, itemsize) in enumerate(zip(parts, its_bytes, itemsizes, strict=True))
    }
    boxes = Boxes(wanted.tensor[of], wanted.offsets[of], wanted.sizes[of])
    for at, part in enumerate(parts):
        boxes.offsets[at, : part.inside.ndim] += np.array(part.inside.offsets, dtype=np.int64)
        boxes.sizes[at, : part.inside.ndim] = part.inside.sizes
    found = _meet(boxes, sources.index.chunks)
    ends = np.cumsum([len(group) for group in groups])
    cuts = np.searchsorted(found.left, [0, *ends])
    rounds = []
    for group, (first, last), end in zip(groups, pairwise(cuts), ends, strict=True):
        copies = _copies(sources, boxes, found, np.arange(first, last), arrays, shared[of], threads)
        mine = its_bytes[end - len(group) : end]
        rounds.append(ReadRound(copies, partial(_put, memory, group, mine)))
    return rounds


def _shapes(index: Index, wanted: Boxes, rows: I64) -> list[tuple[int, Box, int]]:
    """For each of these rows itself, its box without padding, and the bytes of an element."""
    tensor = wanted.tensor[rows]
    ndims, itemsizes = index.tensors.ndim[tensor], ITEMSIZES[index.tensors.dtype[tensor]]
    sizes = wanted.sizes[rows].tolist()
    return [
        (row, Box.whole(tuple(size[:ndim])), itemsize)
        for row, size, ndim, itemsize in zip(
            rows.tolist(), sizes, ndims.tolist(), itemsizes.tolist(), strict=True
        )
    ]


def _put(
    memory: Memory, parts: Sequence[RoundPart], its_bytes: Sequence[NDArray[np.uint8]]
) -> None:
    for part, data in zip(parts, its_bytes, strict=True):
        memory.put(part.row, part.inside, data)


def _as_saved(wanted: Boxes, found: Overlap, index: Index) -> Mask:
    """For each part of a wanted box, whether it is all of it, or as large as parts of boxes that
    were cut on saving (`plan.cutting`).
    """
    all_of_it: Mask = (found.sizes == wanted.sizes[found.left]).all(axis=1)
    nbytes = found.sizes.prod(axis=1) * ITEMSIZES[index.tensors.dtype[wanted.tensor[found.left]]]
    all_of_it |= 2 * nbytes > settings.max_chunk_bytes()
    return all_of_it


def _meet(wanted: Boxes, chunks: Chunks) -> Overlap:
    """Which chunks each wanted box needs, and which box of them."""
    mine = np.zeros(int(wanted.tensor.max(initial=-1)) + 1, dtype=np.bool_)
    mine[wanted.tensor] = True
    used = np.flatnonzero(chunks.tensor < len(mine))
    used = used[mine[chunks.tensor[used]]]
    stored = Boxes(chunks.tensor[used], chunks.offsets[used], chunks.sizes[used])
    found = overlap(wanted, stored)
    return Overlap(found.left, used[found.right], found.offsets, found.sizes)


def _small(
    sources: ChunkLocations,
    wanted: Boxes,
    found: Overlap,
    plain: PlainChunks,
    address: I64,
    fast: I64,
) -> SmallPayloads:
    """The rows `fast` of `found` as small payloads."""
    index = sources.index
    left, right = found.left[fast], found.right[fast]
    element = first_element(found.offsets[fast] - wanted.offsets[left], wanted.sizes[left])
    itemsize = plain.nbytes[fast] // found.sizes[fast].prod(axis=1)
    return SmallPayloads(
        names=index.tensors.names,
        files=index.files,
        tensor=index.chunks.tensor[right],
        file=index.chunks.file[right].astype(np.int64),
        start=plain.start[fast],
        nbytes=plain.nbytes[fast],
        crc=plain.crc[fast],
        into=address[left] + element * itemsize,
    )


def _copies(
    sources: ChunkLocations,
    wanted: Boxes,
    found: Overlap,
    rows: I64,
    arrays: Mapping[int, NDArray[Any]],
    shared: Mask,
    threads: int,
) -> list[ChunkCopy]:
    """The given rows of `found` as copies; `shared`: which wanted boxes others want, too."""
    left, right = found.left[rows], found.right[rows]
    index = sources.index
    known = sources.locate(sorted_unique(right).tolist(), threads=threads)
    inside = found.offsets[rows] - index.chunks.offsets[right]
    into = found.offsets[rows] - wanted.offsets[left]
    ndims = index.tensors.ndim[wanted.tensor[left]].tolist()
    sizes_of = found.sizes[rows]
    copies = []
    for k, (ndim, to, row) in enumerate(zip(ndims, left.tolist(), right.tolist(), strict=True)):
        sizes = tuple(sizes_of[k, :ndim].tolist())
        target = Box(tuple(into[k, :ndim].tolist()), sizes)
        view: tuple[Any, ...] = (*target.slices, ...)  # not a copy, even of a scalar
        copies.append(
            ChunkCopy(
                name=sources.name(row),
                source=known[row],
                box=Box(tuple(inside[k, :ndim].tolist()), sizes),
                into=arrays[to][view],
                shared=bool(shared[to]),
            )
        )
    return copies
