"""Plan for reading boxes into memory: small payloads as arrays, the rest as copies of chunks.

The fast way takes only payloads whose metadata are complete and consistent. All others take the
general way, which reports what is wrong.
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
    """Destinations of boxes, by row. Their memory must not move while this object lives."""

    def addresses(self, rows: I64) -> I64:
        """Return the addresses [R] of the memory of these rows; 0 for a row that has none.

        Memory with an address is writable and holds the elements of the box in C order without
        gaps, in the item size of the stored elements.
        """
        ...

    def array(self, row: int) -> NDArray[Any] | None:
        """Return an array for a whole box, to read into as `ChunkCopy.into`; called once for a row.

        None means that bytes cannot be read into it directly: they are passed to `put`.
        """
        ...

    def put(self, row: int, part: Box, data: NDArray[np.uint8]) -> None:
        """Store a part of a box, whose elements `data` holds in C order as they were stored.

        Args:
            row: row of the box.
            part: the part, relative to the box.
            data: bytes of the part; the buffer is reused after the call.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ReadPlan:
    """The reads that fill some boxes, and where their bytes go.

    Attributes:
        small: whole small payloads whose destinations have addresses.
        reads: the reads that fetch `small`.
        copies: all other reads into the memory of a box.
        rounds: reads into a buffer, whose parts are then passed to `Memory.put`.
        room: number of bytes of that buffer.
        resharded: [R] whether a box is assembled from boxes other than itself. Chunks that were cut
            from one large box when it was saved count as that box.
        memory: the destinations, which the plan keeps alive.
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
        """Read everything; see `io.read.copies.read_copies` for arguments and errors."""
        combined = _CombinedProgress(progress, sum(read.high - read.low for read in self.reads))
        stats = read_copies(
            store,
            self.copies,
            self.rounds,
            verify=verify,
            threads=threads,
            budget=MemoryBudget.of(budget).after_rounds(self.room).nbytes,
            progress=combined.copies,
        )
        nbytes = read_small(
            store,
            self.small,
            self.reads,
            verify=verify,
            threads=threads,
            progress=combined.small,
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


class _CombinedProgress:
    """Progress of copies and then of small payloads, reported as one total."""

    def __init__(self, progress: Progress | None, later: int) -> None:
        self._progress, self._later, self._before = progress or _ignore_progress, later, 0

    def copies(self, phase: str, done: int, total: int) -> None:
        self._before = total
        self._progress(phase, done, total + self._later)

    def small(self, phase: str, done: int, total: int) -> None:
        self._progress(phase, self._before + done, self._before + total)


def _ignore_progress(phase: str, done: int, total: int) -> None:
    """Ignore progress."""


def plan(
    sources: ChunkLocations,
    wanted: Boxes,
    memory: Memory,
    *,
    threads: int,
    together: bool = False,
    budget: int | None = None,
) -> ReadPlan:
    """Return how to read some boxes; read item headers where the index is not sufficient.

    Args:
        sources: locations of the checkpoint's chunks.
        wanted: [R] boxes of tensors of the index, which are covered by its chunks.
        memory: destinations of the boxes.
        threads: number of threads that read item headers.
        together: whether other ranks of this machine load at the same time. If so, whole tensors,
            which all of them need, are read through the page cache, so that the disk is read once.
        budget: limit of the memory that reads use, in bytes. A quarter of it is for boxes that
            cannot be read into directly.

    Raises:
        Damaged: an item extends beyond the end of its file, or the file is missing.
        FormatError: an item's header contradicts the index.
    """
    chunks = sources.index.chunks
    found = _overlapping_chunks(wanted, chunks)
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
    """Return rounds that read the given boxes through a buffer of at most `room` bytes."""
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
    found = _overlapping_chunks(boxes, sources.index.chunks)
    ends = np.cumsum([len(group) for group in groups])
    cuts = np.searchsorted(found.left, [0, *ends])
    rounds = []
    for group, (first, last), end in zip(groups, pairwise(cuts), ends, strict=True):
        copies = _copies(sources, boxes, found, np.arange(first, last), arrays, shared[of], threads)
        mine = its_bytes[end - len(group) : end]
        rounds.append(ReadRound(copies, partial(_put, memory, group, mine)))
    return rounds


def _shapes(index: Index, wanted: Boxes, rows: I64) -> list[tuple[int, Box, int]]:
    """Return for each row the row, its box without padding, and the size of an element."""
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
    """Return for each part of a wanted box whether it corresponds to a chunk as it was saved.

    It does if it is the whole box, or if it is so large that the box was cut when it was saved.
    """
    all_of_it: Mask = (found.sizes == wanted.sizes[found.left]).all(axis=1)
    nbytes = found.sizes.prod(axis=1) * ITEMSIZES[index.tensors.dtype[wanted.tensor[found.left]]]
    all_of_it |= 2 * nbytes > settings.max_chunk_bytes()
    return all_of_it


def _overlapping_chunks(wanted: Boxes, chunks: Chunks) -> Overlap:
    """Return which chunks each wanted box overlaps, and where."""
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
    """Return the rows `fast` of `found` as small payloads."""
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
    """Return these rows of `found` as copies; `shared` marks boxes that other ranks read, too."""
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
        view: tuple[Any, ...] = (*target.slices, ...)  # with "...", a view even of a scalar
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
