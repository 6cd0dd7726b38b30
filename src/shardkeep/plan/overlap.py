"""Intersections of two sets of boxes: the join that resharding is based on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardkeep.plan.sorting import joint_keys, sorted_unique
from shardkeep.types import I64

__all__ = ["Boxes", "Overlap", "first_element", "one_run", "overlap", "sorted_unique"]

_WORKING_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """M boxes as columns, in any order. Coordinates stay below 2**62."""

    tensor: I64
    """[M] number of the tensor; both sides of a join must number tensors alike."""
    offsets: I64
    """[M, D] padded with 0."""
    sizes: I64
    """[M, D] padded with 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Overlap:
    """K non-empty intersections, sorted by left row and then by right row."""

    left: I64
    """[K] row of the left boxes."""
    right: I64
    """[K] row of the right boxes."""
    offsets: I64
    """[K, D] in global coordinates; D is that of the side with more dimensions."""
    sizes: I64
    """[K, D]"""


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """The rows of one side that can intersect anything. Coordinates are [D, M]."""

    row: I64
    tensor: I64
    low: I64
    high: I64

    def take(self, keep: I64) -> _Side:
        return _Side(self.row[keep], self.tensor[keep], self.low[:, keep], self.high[:, keep])


def overlap(left: Boxes, right: Boxes) -> Overlap:
    """Intersect every left box with every right box of the same tensor.

    For each tensor, pairs are enumerated along the dimension in which the fewest pairs intersect,
    so thousands of chunks on both sides do not cost the full product. Memory beyond the result
    stays near 100 MB.
    """
    ndim = max(left.offsets.shape[1], right.offsets.shape[1])
    a, b = _sides(left, right, max(ndim, 1))
    found = [_intersecting(a, b, i, j) for i, j in _candidates(a, b)]
    found = [pairs for pairs in found if len(pairs[0])]
    if not found:
        none = np.zeros(0, dtype=np.int64)
        return Overlap(none, none, np.zeros((0, ndim), np.int64), np.zeros((0, ndim), np.int64))
    i = np.concatenate([pairs[0] for pairs in found])
    j = np.concatenate([pairs[1] for pairs in found])
    order = np.lexsort((b.row[j], a.row[i]))
    i, j = i[order], j[order]
    offsets = np.empty((len(i), ndim), dtype=np.int64)
    sizes = np.empty((len(i), ndim), dtype=np.int64)
    for d in range(ndim):
        offsets[:, d] = np.maximum(a.low[d][i], b.low[d][j])
        sizes[:, d] = np.minimum(a.high[d][i], b.high[d][j]) - offsets[:, d]
    return Overlap(a.row[i], b.row[j], offsets, sizes)


def one_run(sizes: I64, outer: I64) -> NDArray[np.bool_]:
    """Return, for each box, whether its elements are contiguous in the outer box, in C order.

    Args:
        sizes: [K, D] sizes of the boxes.
        outer: [K, D] sizes of the boxes around them.
    """
    # Each dimension has size 1, or all dimensions after it are as wide as those of the outer box.
    wide = np.ones(sizes.shape, dtype=np.bool_)
    for d in range(sizes.shape[1] - 1, 0, -1):
        wide[:, d - 1] = wide[:, d] & (sizes[:, d] == outer[:, d])
    runs: NDArray[np.bool_] = (wide | (sizes == 1)).all(axis=1)
    return runs


def first_element(offsets: I64, outer: I64) -> I64:
    """Return, for each position, how many elements of its box precede it in C order.

    Args:
        offsets: [K, D] the position, relative to the box.
        outer: [K, D] sizes of the box.
    """
    before = np.zeros(len(offsets), dtype=np.int64)
    for d in range(offsets.shape[1]):
        before = before * outer[:, d] + offsets[:, d]
    return before


def _sides(left: Boxes, right: Boxes, ndim: int) -> tuple[_Side, _Side]:
    """Return both sides without empty boxes and without tensors that only one side has."""
    one, other = sorted_unique(left.tensor), sorted_unique(right.tensor)
    shared = np.intersect1d(one, other, assume_unique=True)
    return _side(left, shared, ndim), _side(right, shared, ndim)


def _side(boxes: Boxes, shared: I64, ndim: int) -> _Side:
    row = np.flatnonzero((boxes.sizes > 0).all(axis=1) & np.isin(boxes.tensor, shared))
    low = np.zeros((ndim, len(row)), dtype=np.int64)
    high = np.ones((ndim, len(row)), dtype=np.int64)
    for d in range(boxes.offsets.shape[1]):
        low[d] = boxes.offsets[row, d]
        high[d] = low[d] + boxes.sizes[row, d]
    return _Side(row, np.searchsorted(shared, boxes.tensor[row]), low, high)


def _candidates(a: _Side, b: _Side) -> Iterator[tuple[I64, I64]]:
    """Yield pairs of positions that intersect along one dimension, in bounded portions.

    It is the dimension with the fewest pairs for the tensor.
    """
    if not len(a.row) or not len(b.row):
        return
    first = a.low[:, :1]
    varies = (a.low != first).any(axis=1) | (b.low != first).any(axis=1)
    dims = np.flatnonzero(varies)
    if len(dims) <= 1:
        yield from _along(a, b, int(dims[0]) if len(dims) else 0)
        return
    best = np.argmin(np.stack([_pairs_per_tensor(a, b, int(d)) for d in dims]), axis=0)
    for choice in np.flatnonzero(np.bincount(best)).tolist():
        i = np.flatnonzero(best[a.tensor] == choice)
        j = np.flatnonzero(best[b.tensor] == choice)
        for p, q in _along(a.take(i), b.take(j), int(dims[choice])):
            yield i[p], j[q]


@dataclass(frozen=True, slots=True, eq=False)
class _Spans:
    """Pairs of boxes that intersect along one dimension, as spans of sorted positions.

    Two intervals intersect where one begins inside the other, so each pair is found exactly once:
    from the left one if the right one begins at or after it, and from the right one otherwise.
    """

    a_order: I64
    b_order: I64
    a_begin: I64
    a_count: I64
    b_begin: I64
    b_count: I64


def _spans(a: _Side, b: _Side, d: int) -> _Spans:
    cut = len(a.row)
    low, high = joint_keys(
        np.concatenate([a.tensor, b.tensor]),
        np.concatenate([a.low[d], b.low[d]]),
        np.concatenate([a.high[d], b.high[d]]),
    )
    a_order, b_order = np.argsort(low[:cut], kind="stable"), np.argsort(low[cut:], kind="stable")
    a_sorted, b_sorted = low[:cut][a_order], low[cut:][b_order]
    a_begin = np.searchsorted(b_sorted, low[:cut], "left")
    a_end = np.searchsorted(b_sorted, high[:cut], "left")
    b_begin = np.searchsorted(a_sorted, low[cut:], "right")
    b_end = np.searchsorted(a_sorted, high[cut:], "left")
    return _Spans(a_order, b_order, a_begin, a_end - a_begin, b_begin, b_end - b_begin)


def _pairs_per_tensor(a: _Side, b: _Side, d: int) -> np.ndarray:
    spans = _spans(a, b, d)
    tensors = int(max(a.tensor.max(), b.tensor.max())) + 1
    from_left = np.bincount(a.tensor, spans.a_count, minlength=tensors)
    return from_left + np.bincount(b.tensor, spans.b_count, minlength=tensors)


def _along(a: _Side, b: _Side, d: int) -> Iterator[tuple[I64, I64]]:
    spans = _spans(a, b, d)
    limit = max(1024, _WORKING_BYTES // (64 + 8 * len(a.low)))
    for i, at in _expand(spans.a_begin, spans.a_count, limit):
        yield i, spans.b_order[at]
    for j, at in _expand(spans.b_begin, spans.b_count, limit):
        yield spans.a_order[at], j


def _expand(begin: I64, count: I64, limit: int) -> Iterator[tuple[I64, I64]]:
    """Yield every (row, begin[row] + k) with k < count[row], at most `limit` of them at a time."""
    ends = np.cumsum(count)
    total = int(ends[-1]) if len(ends) else 0
    for start in range(0, total, limit):
        stop = min(start + limit, total)
        first = np.searchsorted(ends, start, "right")
        last = np.searchsorted(ends, stop, "left")
        rows = np.arange(first, last + 1)
        skipped = ends[rows] - count[rows]
        share = np.minimum(ends[rows], stop) - np.maximum(skipped, start)
        at = np.arange(start, stop) + np.repeat(begin[rows] - skipped, share)
        yield np.repeat(rows, share), at


def _intersecting(a: _Side, b: _Side, i: I64, j: I64) -> tuple[I64, I64]:
    """Return those of the pairs that intersect in every dimension."""
    for low_a, high_a, low_b, high_b in zip(a.low, a.high, b.low, b.high, strict=True):
        keep = np.maximum(low_a[i], low_b[j]) < np.minimum(high_a[i], high_b[j])
        i, j = i[keep], j[keep]
    return i, j
