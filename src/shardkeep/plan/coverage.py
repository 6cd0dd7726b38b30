"""Check whether the boxes of a tensor cover it exactly once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shardkeep.plan.sorting import joint_keys
from shardkeep.types import I64, Box

__all__ = ["Problem", "coverage"]

_MAX_COMPARED_BOXES = 256
_MAX_INT64_ELEMENTS = float(1 << 60)


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem with the boxes of one tensor.

    Attributes:
        tensor: row of the tensor.
        kind: "hole", "overlap", or "outside" if a box exceeds the tensor.
        rows: the two boxes that overlap, or all boxes that exceed the tensor; empty for a hole.
        box: a box that no box covers, or that two boxes cover, or the first box that exceeds the
            tensor.
    """

    tensor: int
    kind: Literal["hole", "overlap", "outside"]
    rows: tuple[int, ...]
    box: Box


def coverage(tensor: I64, shape: I64, offsets: I64, sizes: I64) -> tuple[Problem, ...]:
    """Check that the distinct boxes of every tensor cover it exactly once.

    Equal boxes count once, as replicas do. Empty boxes are ignored, so a tensor without elements is
    always covered. A tensor with boxes that exceed it is not searched for holes. One with overlaps
    is searched only if its boxes have fewer elements than it has.

    Boxes are separated by cuts that no box crosses, along one dimension after the other. In a grid,
    and in any layout made by repeated splits, each box is separate after a few sorts. Only boxes
    that cannot be separated are compared pair by pair.

    Args:
        tensor: [M] row in `shape` of each box.
        shape: [N, D] shapes of the tensors, padded with 1.
        offsets, sizes: [M, D] boxes, padded with 0 and 1.

    Returns:
        At most one problem of each kind for a tensor, sorted by tensor.
    """
    problems: list[Problem] = []
    inside = (offsets >= 0) & (sizes >= 0) & (sizes <= shape[tensor] - offsets)
    outside: NDArray[np.bool_] = np.logical_not(inside.all(axis=1))
    if outside.any():
        problems += _outside(tensor, offsets, sizes, np.flatnonzero(outside))
    rows = np.flatnonzero(~outside & (sizes > 0).all(axis=1))
    alone, crowded = _separate(rows, tensor[rows], offsets, sizes)
    if len(crowded):
        crowded = _distinct(crowded, tensor, offsets, sizes)
        more, crowded = _separate(crowded, tensor[crowded], offsets, sizes)
        alone = np.concatenate([alone, more])
        problems += _overlaps(tensor, offsets, sizes, crowded)
    kept = np.concatenate([alone, crowded])
    problems += _holes(shape, tensor[kept], offsets[kept], sizes[kept], skip=tensor[outside])
    return tuple(sorted(problems, key=lambda problem: (problem.tensor, problem.kind)))


def _box(offsets: NDArray[Any], sizes: NDArray[Any]) -> Box:
    return Box(tuple(map(int, offsets)), tuple(map(int, sizes)))


def _outside(tensor: I64, offsets: I64, sizes: I64, rows: I64) -> list[Problem]:
    rows = rows[np.argsort(tensor[rows], kind="stable")]
    firsts = np.flatnonzero(np.diff(tensor[rows], prepend=-1))
    return [
        Problem(
            int(tensor[group[0]]),
            "outside",
            tuple(group.tolist()),
            _box(offsets[group[0]], sizes[group[0]]),
        )
        for group in np.split(rows, firsts[1:])
    ]


def _separate(rows: I64, group: I64, offsets: I64, sizes: I64) -> tuple[I64, I64]:
    """Separate the boxes of each group by cuts that cross no box, as far as possible.

    Returns:
        The rows of boxes that are alone in their part and so overlap nothing, and the other rows.
    """
    alone = [rows[:0]]
    ndim, idle, d = offsets.shape[1], 0, 0
    groups = int(np.count_nonzero(np.bincount(group)))
    if not ndim:  # Scalars: all boxes of a group are equal.
        _, first = np.unique(group, return_index=True)
        return rows[first], rows[:0]
    while len(rows) and idle < ndim:
        start = offsets[rows, d]
        low, high = joint_keys(group, start, start + sizes[rows, d])
        order = np.argsort(low, kind="stable")
        rows, low = rows[order], low[order]
        reach = np.maximum.accumulate(high[order])
        # Keys of a later group are larger than all of an earlier one: groups are separated, too.
        cut = np.append(True, low[1:] >= reach[:-1])
        single = cut & np.append(cut[1:], True)
        alone.append(rows[single])
        group = np.cumsum(cut)[~single]
        rows = rows[~single]
        idle = 0 if int(cut.sum()) > groups else idle + 1
        groups = int(cut.sum()) - int(single.sum())
        d = (d + 1) % ndim
    return np.concatenate(alone), rows


def _distinct(rows: I64, tensor: I64, offsets: I64, sizes: I64) -> I64:
    """Return the first row of each distinct box of each tensor."""
    columns = [*sizes[rows].T, *offsets[rows].T, tensor[rows]]
    order = np.lexsort((rows, *columns))
    fresh = np.zeros(len(rows), dtype=np.bool_)
    fresh[:1] = True
    for column in columns:
        ordered = column[order]
        fresh[1:] |= ordered[1:] != ordered[:-1]
    return np.sort(rows[order[fresh]])


def _overlaps(tensor: I64, offsets: I64, sizes: I64, rows: I64) -> list[Problem]:
    rows = rows[np.argsort(tensor[rows], kind="stable")]
    problems = []
    for group in np.split(rows, np.flatnonzero(np.diff(tensor[rows])) + 1):
        if not len(group):
            continue
        low, high = offsets[group], offsets[group] + sizes[group]
        pair = _crossing(low, high)
        if pair is not None:
            i, j = pair
            start = np.maximum(low[i], low[j])
            box = _box(start, np.minimum(high[i], high[j]) - start)
            both = tuple(sorted((int(group[i]), int(group[j]))))
            problems.append(Problem(int(tensor[group[0]]), "overlap", both, box))
    return problems


def _crossing(low: I64, high: I64) -> tuple[int, int] | None:
    """Return two boxes that overlap, or None. Halves the space until few boxes share a part."""
    parts = [(np.arange(len(low)), low, high)]
    while parts:
        which, lo, hi = parts.pop()
        halves = _halve(lo, hi) if len(which) > _MAX_COMPARED_BOXES else None
        if halves is None:
            pair = _compare(lo, hi)
            if pair is not None:
                return int(which[pair[0]]), int(which[pair[1]])
            continue
        d, at, left, right = halves
        parts.append((which[right], *_clip(lo[right], hi[right], d, at, None)))
        parts.append((which[left], *_clip(lo[left], hi[left], d, None, at)))
    return None


def _halve(low: I64, high: I64) -> tuple[int, int, NDArray[Any], NDArray[Any]] | None:
    """Return dimension and position of a cut, and the boxes of each side; None if no cut helps."""
    best = None
    for d in range(low.shape[1]):
        inner = np.concatenate([low[:, d], high[:, d]])
        at = int(np.partition(inner, len(inner) // 2)[len(inner) // 2])
        left, right = low[:, d] < at, high[:, d] > at
        worse = max(int(left.sum()), int(right.sum()))
        if best is None or worse < best[0]:
            best = (worse, d, at, left, right)
    if best is None or best[0] > len(low) * 7 // 8:
        return None
    return best[1:]


def _clip(low: I64, high: I64, d: int, start: int | None, stop: int | None) -> tuple[I64, I64]:
    low, high = low.copy(), high.copy()
    if start is not None:
        np.maximum(low[:, d], start, out=low[:, d])
    if stop is not None:
        np.minimum(high[:, d], stop, out=high[:, d])
    return low, high


def _compare(low: I64, high: I64) -> tuple[int, int] | None:
    """Compare each box with all later ones, and return the first two that overlap."""
    count = len(low)
    step = max(1, (1 << 18) // max(count, 1))
    for start in range(0, count, step):
        mine = slice(start, start + step)
        meet = np.arange(count)[None, :] > np.arange(count)[mine, None]
        for d in range(low.shape[1]):
            meet &= low[mine, d, None] < high[None, :, d]
            meet &= low[None, :, d] < high[mine, d, None]
        found = np.flatnonzero(meet)
        if len(found):
            i, j = divmod(int(found[0]), count)
            return start + i, j
    return None


def _holes(shape: I64, tensor: I64, offsets: I64, sizes: I64, skip: I64) -> list[Problem]:
    """Return the tensors whose distinct boxes have fewer elements than they have."""
    rough = np.bincount(tensor, sizes.prod(axis=1, dtype=np.float64), len(shape))
    most = np.maximum(rough, shape.prod(axis=1, dtype=np.float64)).max(initial=0)
    exact = bool(most > _MAX_INT64_ELEMENTS)
    want = _volumes(shape, exact)
    have = np.zeros_like(want)
    np.add.at(have, tensor, _volumes(sizes, exact))
    short = have < want
    short[skip] = False
    bad = np.flatnonzero(short)
    mine = np.flatnonzero(short[tensor])
    mine = mine[np.argsort(tensor[mine], kind="stable")]
    begin = np.searchsorted(tensor[mine], bad, "left").tolist()
    end = np.searchsorted(tensor[mine], bad, "right").tolist()
    return [
        Problem(t, "hole", (), _hole(shape[t], offsets[mine[b:e]], sizes[mine[b:e]], exact))
        for t, b, e in zip(bad.tolist(), begin, end, strict=True)
    ]


def _volumes(sizes: I64, exact: bool) -> NDArray[Any]:
    """Return the elements of each box, as Python integers if their sum may exceed 64 bits."""
    volumes: NDArray[Any] = (sizes.astype(object) if exact else sizes).prod(axis=1)
    return volumes


def _hole(shape: I64, offsets: I64, sizes: I64, exact: bool) -> Box:
    """Return a box that is not covered: halve the tensor, and continue in a half with a gap."""
    low, high = offsets, offsets + sizes
    start, stop = np.zeros_like(shape), shape.copy()
    while len(low):
        d, at = _edge(low, high, start, stop)
        left, right = low[:, d] < at, high[:, d] > at
        middle = stop.copy()
        middle[d] = at
        l_low, l_high = _clip(low[left], high[left], d, None, at)
        if _volumes(l_high - l_low, exact).sum() < _volumes((middle - start)[None], exact)[0]:
            low, high, stop = l_low, l_high, middle
        else:
            low, high = _clip(low[right], high[right], d, at, None)
            start[d] = at
    return _box(start, stop - start)


def _edge(low: I64, high: I64, start: I64, stop: I64) -> tuple[int, int]:
    """Return the middle edge of the dimension with the most edges inside the box."""
    most: tuple[int, NDArray[Any]] | None = None
    for d in range(low.shape[1]):
        edges = np.concatenate([low[:, d], high[:, d]])
        edges = edges[(edges > start[d]) & (edges < stop[d])]
        if most is None or len(edges) > len(most[1]):
            most = (d, edges)
    assert most is not None and len(most[1]), "a box that fills the room leaves no hole in it"
    edges = np.sort(most[1])
    return most[0], int(edges[len(edges) // 2])
