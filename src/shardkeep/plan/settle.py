"""Who writes what: the claims of all ranks, merged, checked and shared out. Pure arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.errors import Conflict
from shardkeep.plan.coverage import coverage
from shardkeep.plan.ownership import lowest, owners
from shardkeep.tree import merge
from shardkeep.types import DTYPES, I64, Box, Claim, Path, Structure, Tensors

__all__ = ["Settlement", "settle"]


@dataclass(frozen=True, slots=True, eq=False)
class Settlement:
    """What the checkpoint will hold, and which rank writes which part of it.

    The M chunks are sorted by tensor, then by offsets. Chunks with the same `payload` number are
    aliases: their bytes are written once.
    """

    tensors: Tensors
    tensor: I64
    """[M] row in `tensors`."""
    offsets: I64
    """[M, D]"""
    sizes: I64
    """[M, D]"""
    payload: I64
    """[M] number of the payload, 0 to W - 1."""
    writer: I64
    """[W] the rank that writes the payload."""
    piece: I64
    """[W] which piece of that rank's claim it is."""
    objects: tuple[str, ...]
    object_writer: I64
    """[K] the rank that writes the object."""
    values: Mapping[str, Any]
    differing: tuple[str, ...]
    """Objects of which ranks have different values, as far as values are known."""
    structure: Structure
    twins: Mapping[str, Path]

    def writes(self, rank: int) -> tuple[I64, tuple[str, ...]]:
        """The pieces (ascending) and the objects that a rank has to write."""
        mine = np.sort(self.piece[self.writer == rank])
        names = (*self.objects, *self.twins)
        return mine, tuple(names[i] for i in np.flatnonzero(self.object_writer == rank))


@dataclass(frozen=True, slots=True, eq=False)
class _Pieces:
    """The pieces of all ranks, one under the other; `tensor` counts in the merged names."""

    rank: I64
    row: I64
    tensor: I64
    offsets: I64
    sizes: I64
    alias: I64
    """Position in these columns."""


def settle(
    claims: Sequence[Claim], *, spread: bool = True, same_objects: bool = True
) -> Settlement:
    """Merge what the ranks claim, in rank order; one rank writes each thing.

    Args:
        claims: of each rank.
        spread: share replicas out over the ranks that hold them; else the lowest one writes them.
        same_objects: refuse objects that differ between ranks; else the lowest rank's counts.

    Raises:
        Conflict: one name with two dtypes, shapes, kinds or values; overlaps; holes. It names the
            tensor and the ranks.
    """
    structure = merge([claim.structure for claim in claims])
    tensors, rows = _merge_tensors(claims)
    objects, object_rank, values, differing = _merge_objects(claims)
    if differing and same_objects:
        name, rank = next(iter(differing.items()))
        raise Conflict(
            f"object {name!r} has different values on ranks {object_rank[name]} and {rank}; "
            f"give each rank's its own name, or make them equal; nothing was written"
        )
    _refuse_two_kinds(tensors.names, objects, claims)
    twins, twin_rank = _merge_twins(structure, frozenset(tensors.names), claims)
    pieces = _stack(claims, rows, tensors.shape.shape[1])
    key, first = _distinct(pieces)
    _refuse_bad_cover(tensors, pieces, first)
    payload = _share_payloads(key, pieces.alias)
    itemsize = np.array([dtype.itemsize for dtype in DTYPES], dtype=np.int64)
    nbytes = pieces.sizes.prod(axis=1) * itemsize[tensors.dtype[pieces.tensor]]
    owned = owners(payload, pieces.rank, nbytes) if spread else lowest(payload, pieces.rank)
    chosen = np.flatnonzero(owned)
    chosen = chosen[np.argsort(payload[chosen])]
    return Settlement(
        tensors=tensors,
        tensor=pieces.tensor[first],
        offsets=pieces.offsets[first],
        sizes=pieces.sizes[first],
        payload=payload[first],
        writer=pieces.rank[chosen],
        piece=pieces.row[chosen],
        objects=objects,
        object_writer=np.array(
            [*(object_rank[name] for name in objects), *twin_rank], dtype=np.int64
        ),
        values=values,
        differing=tuple(differing),
        structure=structure,
        twins=twins,
    )


def _merge_twins(
    structure: Structure, tensors: frozenset[str], claims: Sequence[Claim]
) -> tuple[dict[str, Path], list[int]]:
    """The twins that tell the whole truth, and the lowest rank that has each one.

    A container that holds more on another rank has no twin: stock torch puts a twin in the place of
    the leaves when it converts a checkpoint, and would lose what only the other rank had.
    """
    wanted = {path: name for claim in reversed(claims) for name, path in claim.twins.items()}
    total = _leaves_below(structure, wanted)
    with_tensors = {
        path for name in tensors for path in _above(structure.leaves[name]) if path in wanted
    }
    below = [_leaves_below(claim.structure, wanted) for claim in claims]
    twins: dict[str, Path] = {}
    ranks: list[int] = []
    for path, name in sorted(wanted.items(), key=lambda twin: (len(twin[0]), twin[1])):
        whole = [
            r for r, c in enumerate(claims) if name in c.twins and below[r][path] == total[path]
        ]
        if whole and path not in with_tensors and name not in structure.leaves:
            twins[name] = path
            ranks.append(whole[0])
    return twins, ranks


def _above(path: Path) -> Iterator[Path]:
    return (path[:depth] for depth in range(1, len(path)))


def _leaves_below(structure: Structure, wanted: Mapping[Path, str]) -> Counter[Path]:
    """How many leaves there are below each of the wanted containers."""
    if not wanted:
        return Counter()
    leaves = structure.leaves.values()
    return Counter(path for leaf in leaves for path in _above(leaf) if path in wanted)


def _merge_tensors(claims: Sequence[Claim]) -> tuple[Tensors, list[I64]]:
    """All tensors in order of first appearance, and each claim's rows among them."""
    places: dict[str, int] = {}
    origin: list[tuple[int, int]] = []
    rows: list[I64] = []
    for rank, claim in enumerate(claims):
        if rank and claim.tensors.names == claims[0].tensors.names:
            mine = rows[0]
        else:
            mine = np.empty(len(claim.tensors.names), dtype=np.int64)
            for row, name in enumerate(claim.tensors.names):
                place = places.setdefault(name, len(origin))
                if place == len(origin):
                    origin.append((rank, row))
                mine[row] = place
        rows.append(mine)
    width = max((claim.tensors.shape.shape[1] for claim in claims), default=0)
    dtype = np.empty(len(origin), dtype=np.uint8)
    ndim = np.empty(len(origin), dtype=np.uint8)
    shape = np.ones((len(origin), width), dtype=np.int64)
    first_rank = np.array([rank for rank, _ in origin], dtype=np.int64)
    first_row = np.array([row for _, row in origin], dtype=np.int64)
    for rank, claim in enumerate(claims):
        new = np.flatnonzero(first_rank == rank)
        taken = first_row[new]
        dtype[new] = claim.tensors.dtype[taken]
        ndim[new] = claim.tensors.ndim[taken]
        shape[new, : claim.tensors.shape.shape[1]] = claim.tensors.shape[taken]
    merged = Tensors(tuple(places), dtype, ndim, shape)
    for rank, claim in enumerate(claims):
        _refuse_different(merged, claim, rows[rank], first_rank, rank)
    return merged, rows


def _refuse_different(merged: Tensors, claim: Claim, rows: I64, first_rank: I64, rank: int) -> None:
    mine = claim.tensors
    padded = np.ones((len(rows), merged.shape.shape[1]), dtype=np.int64)
    padded[:, : mine.shape.shape[1]] = mine.shape
    differs = (
        (merged.dtype[rows] != mine.dtype)
        | (merged.ndim[rows] != mine.ndim)
        | (merged.shape[rows] != padded).any(axis=1)
    )
    if not differs.any():
        return
    row = int(np.flatnonzero(differs)[0])
    place = int(rows[row])
    raise Conflict(
        f"tensor {mine.names[row]!r} is {_kind(merged, place)} on rank {first_rank[place]} "
        f"and {_kind(mine, row)} on rank {rank}; nothing was written"
    )


def _kind(tensors: Tensors, row: int) -> str:
    shape = tensors.shape[row, : tensors.ndim[row]].tolist()
    return f"{DTYPES[tensors.dtype[row]]}{shape}"


def _merge_objects(
    claims: Sequence[Claim],
) -> tuple[tuple[str, ...], dict[str, int], dict[str, Any], dict[str, int]]:
    """All objects, the lowest rank that has each one, and the values of it that are known.

    Last, for each object that differs between ranks, the lowest rank with another value.
    """
    first: dict[str, int] = {}
    values: dict[str, Any] = {}
    differing: dict[str, int] = {}
    for rank, claim in enumerate(claims):
        for name in claim.objects:
            if name not in first:
                first[name] = rank
                if name in claim.values:
                    values[name] = claim.values[name]
            elif name in values and name in claim.values and values[name] != claim.values[name]:
                differing.setdefault(name, rank)
    return tuple(first), first, values, differing


def _refuse_two_kinds(
    tensors: tuple[str, ...], objects: tuple[str, ...], claims: Sequence[Claim]
) -> None:
    both = set(tensors).intersection(objects)
    if not both:
        return
    name = min(both)
    as_tensor = [rank for rank, claim in enumerate(claims) if name in claim.tensors.names]
    as_object = [rank for rank, claim in enumerate(claims) if name in claim.objects]
    raise Conflict(
        f"{name!r} is a tensor on {_ranks(as_tensor)} and an object on {_ranks(as_object)}; "
        f"nothing was written"
    )


def _stack(claims: Sequence[Claim], rows: Sequence[I64], width: int) -> _Pieces:
    counts = np.array([len(claim.piece) for claim in claims], dtype=np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    offsets = np.zeros((int(starts[-1]), width), dtype=np.int64)
    sizes = np.ones((int(starts[-1]), width), dtype=np.int64)
    for start, claim in zip(starts, claims, strict=False):
        part = slice(int(start), int(start) + len(claim.piece))
        offsets[part, : claim.offsets.shape[1]] = claim.offsets
        sizes[part, : claim.sizes.shape[1]] = claim.sizes
    return _Pieces(
        rank=np.repeat(np.arange(len(claims), dtype=np.int64), counts),
        row=np.concatenate([np.arange(n, dtype=np.int64) for n in counts]),
        tensor=np.concatenate([rows[r][claim.piece] for r, claim in enumerate(claims)]),
        offsets=offsets,
        sizes=sizes,
        alias=np.concatenate(
            [claim.alias + start for start, claim in zip(starts, claims, strict=False)]
        ),
    )


def _distinct(pieces: _Pieces) -> tuple[I64, I64]:
    """Number the distinct boxes by tensor and offsets: each piece's number, and each one's first
    piece."""
    columns = np.column_stack([pieces.tensor, pieces.offsets, pieces.sizes])
    order = np.lexsort(columns.T[::-1])
    ordered = columns[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    key = np.empty(len(order), dtype=np.int64)
    key[order] = np.cumsum(new) - 1
    return key, order[new]


def _refuse_bad_cover(tensors: Tensors, pieces: _Pieces, first: I64) -> None:
    problems = coverage(
        pieces.tensor[first], tensors.shape, pieces.offsets[first], pieces.sizes[first]
    )
    if not problems:
        return
    lines = [_describe(problem, tensors, pieces, first) for problem in problems[:10]]
    if len(problems) > len(lines):
        lines.append(f"and {len(problems) - len(lines)} more")
    raise Conflict("; ".join(lines) + "; nothing was written")


def _describe(problem: Any, tensors: Tensors, pieces: _Pieces, first: I64) -> str:
    row = problem.tensor
    ndim = int(tensors.ndim[row])
    box = Box(problem.box.offsets[:ndim], problem.box.sizes[:ndim])
    name = f"tensor {tensors.names[row]!r} {_kind(tensors, row)}"
    if problem.kind == "hole":
        holders = sorted(set(pieces.rank[pieces.tensor == row].tolist()))
        have = f"{_ranks(holders)} hold other parts of it" if holders else "no rank has any of it"
        return f"{name}: no rank holds {box} ({have})"
    ranks = sorted({int(pieces.rank[first[r]]) for r in problem.rows})
    word = "overlap at" if problem.kind == "overlap" else "lie outside of it at"
    return f"{name}: boxes of {_ranks(ranks)} {word} {box}"


def _ranks(ranks: Sequence[int]) -> str:
    few = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {few}" if len(ranks) == 1 else f"ranks {few}"


def _share_payloads(key: I64, alias: I64) -> I64:
    """Number the payloads from 0: keys that any rank calls aliases get the same one."""
    count = int(key.max(initial=-1)) + 1
    root = np.arange(count, dtype=np.int64)
    aliased = np.flatnonzero(alias != np.arange(len(alias)))
    for a, b in {(int(key[i]), int(key[alias[i]])) for i in aliased}:
        low, high = sorted((_root(root, a), _root(root, b)))
        root[high] = low
    while (root[root] != root).any():
        root = root[root]
    _, payload = np.unique(root, return_inverse=True)
    numbered: NDArray[np.int64] = payload.reshape(-1).astype(np.int64)
    return numbered[key]


def _root(root: I64, key: int) -> int:
    while root[key] != key:
        key = int(root[key])
    return key
