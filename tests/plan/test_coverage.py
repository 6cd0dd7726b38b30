"""Coverage of tensors by boxes, compared with boxes that are painted into arrays."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkeep.plan.coverage import Problem, coverage
from shardkeep.types import Box


def i64(values, ndim=None):
    array = np.array(values, dtype=np.int64)
    return array.reshape(-1, ndim) if ndim is not None else array.reshape(-1)


def paint(shape, boxes):
    counts = np.zeros(shape, dtype=np.int64)
    for box in boxes:
        counts[box.slices] += 1
    return counts


def check(shapes, rows):
    """Return the problems of rows of (tensor, Box) in any order."""
    ndim = len(shapes[0])
    return coverage(
        i64([t for t, _ in rows]),
        i64(shapes, ndim),
        i64([b.offsets for _, b in rows], ndim),
        i64([b.sizes for _, b in rows], ndim),
    )


def cut(draw, box, depth):
    """Yield the parts of a box that is split again and again at random positions."""
    d = draw(st.integers(0, box.ndim - 1))
    if depth == 0 or box.sizes[d] < 2:
        return [box]
    at = draw(st.integers(1, box.sizes[d] - 1))
    sizes, rest, moved = list(box.sizes), list(box.sizes), list(box.offsets)
    sizes[d], rest[d], moved[d] = at, box.sizes[d] - at, box.offsets[d] + at
    halves = Box(box.offsets, tuple(sizes)), Box(tuple(moved), tuple(rest))
    return [part for half in halves for part in cut(draw, half, depth - 1)]


@st.composite
def layouts(draw):
    ndim = draw(st.integers(1, 3))
    shapes, rows = [], []
    for t in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 6), min_size=ndim, max_size=ndim)))
        shapes.append(shape)
        boxes = cut(draw, Box.whole(shape), draw(st.integers(0, 4)))
        if draw(st.booleans()) and boxes:
            boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        if draw(st.booleans()):
            offsets = tuple(draw(st.integers(0, n)) for n in shape)
            sizes = tuple(draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True))
            boxes.append(Box(offsets, sizes))
        if boxes and draw(st.booleans()):
            boxes.append(draw(st.sampled_from(boxes)))
        rows += [(t, box) for box in boxes]
    return shapes, draw(st.permutations(rows))


def compare(shapes, rows):
    """Compare the problems with those that painting shows."""
    problems = check(shapes, rows)
    assert list(problems) == sorted(problems, key=lambda p: (p.tensor, p.kind))
    for t, shape in enumerate(shapes):
        counts = paint(shape, {box for tensor, box in rows if tensor == t})
        kinds = {p.kind: p for p in problems if p.tensor == t}
        assert ("overlap" in kinds) == bool((counts > 1).any())
        if "hole" in kinds:
            box = kinds["hole"].box
            assert box.numel and box.within(shape) and (counts[box.slices] == 0).all()
        elif "overlap" not in kinds:
            assert (counts == 1).all()
        if "overlap" in kinds:
            i, j = kinds["overlap"].rows
            assert rows[i][0] == rows[j][0] == t
            assert rows[i][1].intersect(rows[j][1]) == kinds["overlap"].box


@settings(max_examples=250)
@given(layouts())
def test_coverage_agrees_with_painting(layout):
    compare(*layout)


@pytest.mark.parametrize("seed", range(20))
def test_few_boxes_anywhere_agree_with_painting(seed):
    rng = np.random.default_rng(seed)
    for _ in range(50):
        ndim = int(rng.integers(1, 4))
        shape = tuple(rng.integers(1, 9, ndim).tolist())
        low = rng.integers(0, shape, (int(rng.integers(1, 7)), ndim))
        sizes = rng.integers(1, np.array(shape) - low + 1)
        boxes = [Box(tuple(o), tuple(s)) for o, s in zip(low.tolist(), sizes.tolist(), strict=True)]
        compare([shape], [(0, box) for box in boxes])


def test_a_box_may_extend_past_several_others():
    """The cut before the third box crosses the first one, though not the second one."""
    boxes = [Box((0, 0), (10, 5)), Box((1, 5), (1, 5)), Box((3, 0), (1, 5))]
    (overlap,) = [p for p in check([(10, 10)], [(0, b) for b in boxes]) if p.kind == "overlap"]
    assert overlap == Problem(0, "overlap", (0, 2), Box((3, 0), (1, 5)))


@settings(max_examples=100)
@given(st.integers(0, 2**32), st.integers(300, 900), st.booleans())
def test_many_boxes_that_no_cut_separates(seed, count, clash):
    """Pinwheels of five boxes, which no straight cut separates, in a number that needs halving."""
    rng = np.random.default_rng(seed)
    wheel = [(0, 0, 1, 2), (0, 2, 2, 1), (2, 1, 1, 2), (1, 0, 2, 1), (1, 1, 1, 1)]
    side = int(np.sqrt(count / 5)) + 1
    offsets, sizes = [], []
    for x in range(side):
        for y in range(side):
            for a, b, h, w in wheel:
                offsets.append((3 * x + a, 3 * y + b))
                sizes.append((h, w))
    order = rng.permutation(len(offsets))
    offsets, sizes = i64(offsets, 2)[order], i64(sizes, 2)[order]
    # One long box overlaps all wheels at one side of the tensor.
    if clash:
        offsets, sizes = np.append(offsets, [[0, 0]], 0), np.append(sizes, [[3 * side, 1]], 0)
    shape = i64([(3 * side, 3 * side)], 2)
    problems = coverage(np.zeros(len(offsets), np.int64), shape, offsets, sizes)
    assert [p.kind for p in problems] == (["overlap"] if clash else [])


def test_one_giant_pinwheel_is_compared_box_by_box():
    """A spiral of thin strips around a core, which has no cut that crosses no box."""
    low, high, boxes = 0, 2000, []
    while high - low > 2:
        n = high - low
        boxes += [
            Box((low, low), (1, n - 1)),
            Box((low, high - 1), (n - 1, 1)),
            Box((high - 1, low + 1), (1, n - 1)),
            Box((low + 1, low), (n - 1, 1)),
        ]
        low, high = low + 1, high - 1
    boxes.append(Box((low, low), (2, 2)))
    assert check([(2000, 2000)], [(0, b) for b in boxes]) == ()
    last = boxes.pop(1500)
    (problem,) = check([(2000, 2000)], [(0, b) for b in boxes])
    assert problem.kind == "hole" and last.intersect(problem.box) == problem.box
    boxes += [last, Box(last.offsets, (1, 1))]
    (problem,) = check([(2000, 2000)], [(0, b) for b in boxes])
    assert problem == Problem(0, "overlap", (len(boxes) - 2, len(boxes) - 1), boxes[-1])


@pytest.mark.parametrize(
    "box",
    [Box((-1, 0), (1, 1)), Box((0, 3), (1, 2)), Box((2**62, 0), (2**62, 1)), Box((0, 0), (-1, 4))],
)
def test_outside(box):
    (problem,) = check([(4, 4)], [(0, Box((0, 0), (4, 4))), (0, box)])
    assert problem == Problem(0, "outside", (1,), box)


def test_scalars_and_empty():
    none = np.zeros((0, 0), np.int64)
    assert coverage(i64([]), none, none, none) == ()
    twice = np.zeros((2, 0), np.int64)
    assert coverage(i64([0, 0]), twice[:1], twice, twice) == ()
    assert coverage(i64([]), twice[:1], none, none) == (Problem(0, "hole", (), Box((), ())),)
    assert check([(0, 5)], []) == ()
    assert check([(2, 5)], []) == (Problem(0, "hole", (), Box((0, 0), (2, 5))),)


def test_huge_tensors_do_not_wrap_around():
    whole = Box.whole((2**40, 2**40))
    assert check([(2**40, 2**40)], [(0, whole)]) == ()
    part = Box((0, 0), (2**40, 2**40 - 1))
    (problem,) = check([(2**40, 2**40)], [(0, part)])
    assert problem.box == Box((0, 2**40 - 1), (2**40, 1))
    # 2**64 elements would be 0 in 64 bits.
    assert [p.kind for p in check([(2**32, 2**32)], [])] == ["hole"]


def grid(tensors, x, y, h=3, w=5):
    ij = np.stack(np.meshgrid(np.arange(x), np.arange(y), indexing="ij"), -1).reshape(-1, 2)
    offsets = np.tile(ij * [h, w], (tensors, 1))
    sizes = np.broadcast_to(np.array([h, w]), offsets.shape)
    tensor = np.repeat(np.arange(tensors), x * y)
    return tensor, np.tile([[x * h, y * w]], (tensors, 1)), offsets, sizes


@pytest.mark.parametrize("tensors, x, y", [(1, 512, 512), (2000, 128, 1), (500, 16, 32)])
def test_a_quarter_million_boxes_take_seconds_at_most(tensors, x, y):
    tensor, shape, offsets, sizes = grid(tensors, x, y)
    begin = time.process_time()
    assert coverage(tensor, shape, offsets, sizes) == ()
    keep = np.ones(len(tensor), bool)
    keep[len(tensor) // 3] = False
    (problem,) = coverage(tensor[keep], shape, offsets[keep], sizes[keep])
    assert problem.box.offsets == tuple(offsets[len(tensor) // 3])
    grown = sizes.copy()
    grown[len(tensor) // 4] += [0, 1] if y > 1 else [1, 0]
    kinds = [p.kind for p in coverage(tensor, shape, offsets, grown)]
    assert kinds == ["overlap"]
    assert time.process_time() - begin < 10
