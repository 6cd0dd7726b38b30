"""Intersections of two sets of boxes, compared with all pairs one by one."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardkeep.plan.overlap as module
from shardkeep.plan.overlap import Boxes, first_element, one_run, overlap, sorted_unique
from shardkeep.types import Box


@st.composite
def sides(draw, ndim):
    count = draw(st.integers(0, 12))
    tensor = draw(st.lists(st.integers(-2, 3), min_size=count, max_size=count))
    offsets = [[draw(st.integers(0, 5)) for _ in range(ndim)] for _ in range(count)]
    sizes = [[draw(st.integers(0, 4)) for _ in range(ndim)] for _ in range(count)]
    return boxes(tensor, offsets, sizes, ndim)


def boxes(tensor, offsets, sizes, ndim):
    def column(values):
        return np.array(values, dtype=np.int64).reshape(len(tensor), ndim)

    return Boxes(np.array(tensor, dtype=np.int64).reshape(-1), column(offsets), column(sizes))


def rows(side, ndim):
    """Return single boxes as columns, padded to `ndim` dimensions."""
    for t, offsets, sizes in zip(side.tensor, side.offsets, side.sizes, strict=True):
        more = ndim - len(sizes)
        yield t, Box((*map(int, offsets), *[0] * more), (*map(int, sizes), *[1] * more))


def naive(left, right, ndim):
    return [
        (i, j, met)
        for i, (t, a) in enumerate(rows(left, ndim))
        for j, (u, b) in enumerate(rows(right, ndim))
        if t == u and (met := a.intersect(b)) is not None
    ]


def as_rows(found):
    return [
        (int(i), int(j), Box(tuple(map(int, o)), tuple(map(int, s))))
        for i, j, o, s in zip(found.left, found.right, found.offsets, found.sizes, strict=True)
    ]


dims = st.integers(0, 3)


@settings(max_examples=250)
@given(st.tuples(dims, dims).flatmap(lambda d: st.tuples(sides(d[0]), sides(d[1]))))
def test_overlap_agrees_with_every_pair_compared(both):
    left, right = both
    ndim = max(left.offsets.shape[1], right.offsets.shape[1])
    found = overlap(left, right)
    assert found.offsets.shape == found.sizes.shape == (len(found.left), ndim)
    assert {found.left.dtype, found.right.dtype, found.sizes.dtype} == {np.dtype(np.int64)}
    assert as_rows(found) == naive(left, right, ndim)


@pytest.mark.parametrize("seed", range(5))
def test_results_are_the_same_in_small_portions(monkeypatch, seed):
    monkeypatch.setattr(module, "_WORKING_BYTES", 0)  # 1,024 pairs at a time
    rng = np.random.default_rng(seed)

    def side(n):
        return Boxes(
            rng.integers(0, 2, n), rng.integers(0, 90, (n, 2)), rng.integers(0, 99, (n, 2))
        )

    left, right = side(150), side(130)
    expected = naive(left, right, 2)
    assert len(expected) > 3000
    assert as_rows(overlap(left, right)) == expected


def test_coordinates_whose_keys_do_not_fit_64_bits():
    far = 2**61
    left = boxes([0, 1, 7], [[0], [far], [5]], [[far + 1], [3], [1]], 1)
    right = boxes([1, 0], [[far + 2], [far]], [[9], [1]], 1)
    assert as_rows(overlap(left, right)) == [
        (0, 1, Box((far,), (1,))),
        (1, 0, Box((far + 2,), (1,))),
    ]


def chunks(n, wide, d):
    offsets = np.zeros((n, 2), np.int64)
    sizes = np.full((n, 2), n * wide, np.int64)
    offsets[:, d], sizes[:, d] = np.arange(n) * wide, wide
    return Boxes(np.zeros(n, np.int64), offsets, sizes)


def test_thousands_of_chunks_on_both_sides():
    begin = time.process_time()
    same = overlap(chunks(100_000, 4, 1), chunks(100_000, 4, 1))
    assert (same.left == np.arange(100_000)).all() and (same.right == same.left).all()
    shifted = overlap(chunks(40_000, 5, 0), chunks(50_000, 4, 0))
    assert len(shifted.left) == 80_000
    assert (shifted.sizes[:, 0].sum(), shifted.sizes[:, 1].min()) == (200_000, 200_000)
    assert time.process_time() - begin < 5


def test_memory_stays_bounded():
    """Nearly all pairs intersect along each dimension, but none of them in both."""
    n = 6000
    left, right = chunks(n, 2, 0), chunks(n, 2, 1)
    left.sizes[:, 1] = 1
    right.offsets[:, 0] += 2 * n
    tracemalloc.start()
    assert len(overlap(left, right).left) == 0
    tall = Boxes(left.tensor, right.offsets * 0 + [0, 1], left.sizes * 0 + [2 * n, 1])
    wide = Boxes(left.tensor, left.offsets * 0, left.sizes * 0 + [1, 1])
    assert len(overlap(tall, wide).left) == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150 << 20


@given(st.data(), dims)
def test_runs_and_positions_are_those_of_numpy(data, ndim):
    outer = [data.draw(st.integers(1, 4)) for _ in range(ndim)]
    offsets = [data.draw(st.integers(0, size - 1)) for size in outer]
    sizes = [
        data.draw(st.integers(1, size - offset))
        for size, offset in zip(outer, offsets, strict=True)
    ]
    numbers = np.arange(np.prod(outer, dtype=np.int64)).reshape(outer)
    inside = numbers[Box(tuple(offsets), tuple(sizes)).slices].reshape(-1)
    column = boxes([0], offsets, sizes, ndim)
    around = boxes([0], offsets, outer, ndim).sizes
    assert first_element(column.offsets, around).tolist() == [inside[0]]
    neighbours = bool((np.diff(inside) == 1).all())
    assert one_run(column.sizes, around).tolist() == [neighbours]


@given(st.lists(st.integers(-5, 5)))
def test_sorted_unique_returns_each_number_once(numbers):
    assert sorted_unique(np.array(numbers, dtype=np.int64)).tolist() == sorted(set(numbers))
