"""Arithmetic of placements: which boxes of a sharded tensor a rank holds, and where.

Each dimension is a list of index runs: the global indices that a rank holds, in the order in which
they are in its memory. Each placement cuts such a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from shardkeep.types import Box

__all__ = [
    "PlacedBox",
    "Placement",
    "Replicate",
    "Shard",
    "StridedShard",
    "cut_order",
    "placed_boxes",
]


@dataclass(frozen=True, slots=True)
class Shard:
    """Cuts dimension `dim` into as many chunks as the mesh dimension has ranks."""

    dim: int


@dataclass(frozen=True, slots=True)
class StridedShard:
    """Cuts dimension `dim` into `split_factor` chunks, and then each of these as `Shard` does.

    It means that a mesh dimension further right cuts first (FSDP2 over tensor parallelism).
    """

    dim: int
    split_factor: int


@dataclass(frozen=True, slots=True)
class Replicate:
    """Leaves the same elements on all ranks of the mesh dimension."""


Placement = Shard | StridedShard | Replicate


@dataclass(frozen=True, slots=True)
class PlacedBox:
    """A box of the global tensor, and the slices of the local tensor that hold it."""

    box: Box
    local: tuple[slice, ...]


IndexRuns = list[tuple[int, int]]
"""(start, length) of each range of global indices. No range is empty or touches the next one."""


def placed_boxes(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
    sequence: Sequence[int] | None = None,
) -> tuple[PlacedBox, ...]:
    """Return the boxes that the rank at `coordinate` holds of a tensor of that global shape.

    Cuts are as uneven as those of `torch.chunk`: each chunk has the size of the first one, but the
    last ones are smaller or empty. If strided shards describe a sequence of plain cuts (see
    `cut_order`), that sequence is used, as by FSDP2. Otherwise, placements cut from left to right.

    Args:
        shape: the global shape.
        mesh_shape: the number of ranks along each mesh dimension.
        coordinate: the position of the rank in the mesh.
        placements: one for each mesh dimension.
        sequence: the mesh dimensions in the order in which they cut, if it is known.

    Returns:
        Boxes that do not overlap, in the order of the local tensor; none if it is empty.

    Raises:
        ValueError: a placement names a dimension that the tensor does not have.
    """
    if sequence is None:
        placements, sequence = cut_order(mesh_shape, placements) or (
            placements,
            range(len(placements)),
        )
    runs: list[IndexRuns] = [[(0, size)] if size else [] for size in shape]
    for axis in sequence:
        placement, count, index = placements[axis], mesh_shape[axis], coordinate[axis]
        if isinstance(placement, Replicate):
            continue
        if not 0 <= placement.dim < len(runs):
            raise ValueError(f"{placement} is not possible for a tensor of {len(runs)} dimensions")
        pieces = [runs[placement.dim]]
        if isinstance(placement, StridedShard):
            factor = placement.split_factor
            pieces = [_chunk(pieces[0], factor, i) for i in range(factor)]
        runs[placement.dim] = _joined([_chunk(piece, count, index) for piece in pieces])
    sides = [list(zip(dim, _local_slices(dim), strict=True)) for dim in runs]
    return tuple(
        PlacedBox(
            Box(tuple(start for (start, _), _ in side), tuple(size for (_, size), _ in side)),
            tuple(local for _, local in side),
        )
        for side in product(*sides)
    )


def cut_order(
    mesh_shape: Sequence[int], placements: Sequence[Placement]
) -> tuple[tuple[Placement, ...], tuple[int, ...]] | None:
    """Return the plain shards that strided shards describe, and the sequence of their cuts.

    None if there is no such sequence. A split factor is the product of the mesh dimensions further
    right that cut the same dimension earlier. Even cuts give the same boxes if strided shards are
    applied from left to right. Uneven ones do not (7 rows on a mesh of 3 x 2). Then both FSDP2 and
    torch's own redistribution (2.13) use this sequence.
    """
    later: dict[int, list[int]] = {}
    for axis in reversed(range(len(placements))):
        placement = placements[axis]
        if isinstance(placement, Replicate):
            continue
        before = later.setdefault(placement.dim, [])
        factor = placement.split_factor if isinstance(placement, StridedShard) else 1
        sizes = [prod(mesh_shape[a] for a in before[:i]) for i in range(len(before) + 1)]
        if factor not in sizes:
            return None
        before.insert(sizes.index(factor), axis)
    plain = tuple(Shard(p.dim) if isinstance(p, StridedShard) else p for p in placements)
    return plain, tuple(axis for axes in later.values() for axis in axes)


def _chunk(runs: IndexRuns, count: int, index: int) -> IndexRuns:
    """Return the chunk at `index` of `count` chunks of these indices, as torch.chunk cuts them."""
    total = sum(length for _, length in runs)
    size = -(-total // count)
    low, high = index * size, (index + 1) * size
    found: IndexRuns = []
    position = 0
    for start, length in runs:
        first, last = max(low - position, 0), min(high - position, length)
        if first < last:
            found.append((start + first, last - first))
        position += length
    return found


def _joined(pieces: Sequence[IndexRuns]) -> IndexRuns:
    """Return the pieces one after another. Runs that touch become one."""
    joined: IndexRuns = []
    for start, length in (run for piece in pieces for run in piece):
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((start, length))
    return joined


def _local_slices(runs: IndexRuns) -> list[slice]:
    """Return the slice of the local tensor for each run."""
    slices: list[slice] = []
    position = 0
    for _, length in runs:
        slices.append(slice(position, position + length))
        position += length
    return slices
