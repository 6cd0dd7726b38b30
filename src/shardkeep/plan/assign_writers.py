"""Assignment of writers: the claims of all ranks are merged, checked and distributed over ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.errors import Conflict
from shardkeep.plan.coverage import coverage
from shardkeep.plan.distinct import distinct
from shardkeep.plan.markers import check_markers, format_ranks
from shardkeep.plan.merging import merge
from shardkeep.plan.ownership import lowest, owners
from shardkeep.types import DTYPES, I64, ITEMSIZES, Box, Claim, Path, Structure, Tensors

__all__ = ["WritePlan", "assign_writers"]


@dataclass(frozen=True, slots=True, eq=False)
class WritePlan:
    """Content of a checkpoint to be saved, and the rank that writes each part of it.

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
    """[W] row of the payload among the pieces of that rank's claim."""
    objects: tuple[str, ...]
    object_writer: I64
    """[K] the rank that writes the object."""
    values: Mapping[str, Any]
    differing: tuple[str, ...]
    """Objects whose known values differ between ranks."""
    structure: Structure
    legacy_duplicates: Mapping[str, Path]

    def orders(self, ranks: int) -> list[tuple[I64, tuple[str, ...]]]:
        """Return the pieces, ascending, and the objects that each rank writes."""
        names = (*self.objects, *self.legacy_duplicates)
        pieces = self.piece[np.lexsort((self.piece, self.writer))]
        objects = np.argsort(self.object_writer, kind="stable")
        return [
            (mine, tuple(names[row] for row in rows.tolist()))
            for mine, rows in zip(
                np.split(pieces, _bounds(self.writer, ranks)),
                np.split(objects, _bounds(self.object_writer, ranks)),
                strict=True,
            )
        ]


def _bounds(writer: I64, ranks: int) -> I64:
    """Return the first row of each rank but rank 0, in rows that are sorted by writer."""
    return np.cumsum(np.bincount(writer, minlength=ranks))[:-1]


@dataclass(frozen=True, slots=True, eq=False)
class _Pieces:
    """The pieces of all ranks, concatenated; `tensor` is a position in the merged names."""

    rank: I64
    row: I64
    tensor: I64
    offsets: I64
    sizes: I64
    alias: I64
    """Row of the piece, among these, that shares its memory."""


def assign_writers(
    claims: Sequence[Claim],
    *,
    balance_replicas: bool = True,
    require_identical_objects: bool = True,
) -> WritePlan:
    """Merge the claims of all ranks, and choose the rank that writes each piece and object.

    Args:
        claims: the claim of each rank, in order.
        balance_replicas: distribute replicas over the ranks that hold them. Otherwise the lowest
            rank writes them.
        require_identical_objects: refuse objects that differ between ranks. Otherwise that of the
            lowest rank is saved.

    Raises:
        Conflict: a name has two dtypes, shapes, kinds or values; boxes overlap, or leave a hole; or
            marked replicas differ. The error names the tensor and the ranks.
    """
    check_markers(claims)
    structure = merge([claim.structure for claim in claims])
    tensors, rows = _merge_tensors(claims)
    objects, object_rank, values, differing = _merge_objects(claims)
    if differing and require_identical_objects:
        name, rank = next(iter(differing.items()))
        raise Conflict(
            f"object {name!r} has different values on ranks {object_rank[name]} and {rank}; "
            f"give each rank's its own name, or make them equal; nothing was written"
        )
    _refuse_two_kinds(tensors.names, objects, claims)
    legacy_duplicates, twin_rank = _merge_legacy_duplicates(structure, tensors.names, claims)
    pieces = _stack(claims, rows, tensors.shape.shape[1])
    key, first = distinct([pieces.tensor, *pieces.offsets.T, *pieces.sizes.T])
    _refuse_bad_cover(tensors, pieces, first)
    payload = _share_payloads(key, pieces.alias)
    nbytes = pieces.sizes.prod(axis=1) * ITEMSIZES[tensors.dtype[pieces.tensor]]
    owned = (
        owners(payload, pieces.rank, nbytes) if balance_replicas else lowest(payload, pieces.rank)
    )
    chosen = np.flatnonzero(owned)
    chosen = chosen[np.argsort(payload[chosen])]
    return WritePlan(
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
        legacy_duplicates=legacy_duplicates,
    )


def _merge_legacy_duplicates(
    structure: Structure, tensors: Sequence[str], claims: Sequence[Claim]
) -> tuple[dict[str, Path], list[int]]:
    """Return the complete legacy duplicates, and the lowest rank that holds each of them.

    A container with more leaves on another rank gets no duplicate. When stock torch converts a
    checkpoint, it replaces the leaves by the duplicate, and would lose those of the other rank.
    """
    wanted = {
        path: name for claim in reversed(claims) for name, path in claim.legacy_duplicates.items()
    }
    legacy_duplicates: dict[str, Path] = {}
    ranks: list[int] = []
    if not wanted:
        return legacy_duplicates, ranks
    total = _leaves_below(structure.leaves.values(), wanted)
    with_tensors = _leaves_below((structure.leaves[name] for name in tensors), wanted)
    counts = {id(structure): total}
    for claim in claims:
        if id(claim.structure) not in counts:
            leaves = claim.structure.leaves.values()
            counts[id(claim.structure)] = _leaves_below(leaves, wanted)
    below = [counts[id(claim.structure)] for claim in claims]
    for path, name in sorted(wanted.items(), key=lambda twin: (len(twin[0]), twin[1])):
        whole = [
            r
            for r, c in enumerate(claims)
            if name in c.legacy_duplicates and below[r][path] == total[path]
        ]
        if whole and path not in with_tensors and name not in structure.leaves:
            legacy_duplicates[name] = path
            ranks.append(whole[0])
    return legacy_duplicates, ranks


def _leaves_below(leaves: Iterable[Path], wanted: Mapping[Path, str]) -> Counter[Path]:
    """Return the number of leaves below each of the wanted containers that has any."""
    found = Counter[Path]()
    for path, count in Counter(leaf[:-1] for leaf in leaves).items():
        for depth in range(1, len(path) + 1):
            if path[:depth] in wanted:
                found[path[:depth]] += count
    return found


def _merge_tensors(claims: Sequence[Claim]) -> tuple[Tensors, list[I64]]:
    """Return all tensors in order of first appearance, and their rows for each claim."""
    head = claims[0].tensors if claims else None
    if head is not None and all(claim.tensors is head for claim in claims):
        return head, [np.arange(len(head.names), dtype=np.int64)] * len(claims)
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
    first_rank, first_row = np.array(origin, dtype=np.int64).reshape(-1, 2).T
    ends = np.searchsorted(first_rank, np.arange(len(claims)), "right").tolist()
    for claim, start, end in zip(claims, [0, *ends], ends, strict=False):
        new, taken = slice(start, end), first_row[start:end]
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
    """Return all objects, the lowest rank that holds each, and their known values.

    Also returns, for each object that differs between ranks, the lowest rank with another value.
    """
    first: dict[str, int] = {}
    values: dict[str, Any] = {}
    differing: dict[str, int] = {}
    for rank, claim in enumerate(claims):
        if rank and claim.objects is claims[0].objects and claim.values is claims[0].values:
            continue
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
    both = set(objects).intersection(tensors)
    if not both:
        return
    name = min(both)
    as_tensor = [rank for rank, claim in enumerate(claims) if name in claim.tensors.names]
    as_object = [rank for rank, claim in enumerate(claims) if name in claim.objects]
    raise Conflict(
        f"{name!r} is a tensor on {format_ranks(as_tensor)} and an object on "
        f"{format_ranks(as_object)}; nothing was written"
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
        have = (
            f"{format_ranks(holders)} hold other parts of it"
            if holders
            else "no rank has any of it"
        )
        return f"{name}: no rank holds {box} ({have})"
    ranks = sorted({int(pieces.rank[first[r]]) for r in problem.rows})
    word = "overlap at" if problem.kind == "overlap" else "exceed it at"
    return f"{name}: boxes of {format_ranks(ranks)} {word} {box}"


def _share_payloads(key: I64, alias: I64) -> I64:
    """Return the payload of each piece, numbered from 0; aliases on any rank share one."""
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
