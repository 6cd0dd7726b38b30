"""Cutting of large boxes into parts that tile them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardkeep.plan.cutting import cut
from shardkeep.types import Box


@st.composite
def cases(draw):
    sizes = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    offsets = tuple(draw(st.integers(0, 100)) for _ in sizes)
    return Box(offsets, sizes), draw(st.integers(1, 8)), draw(st.integers(1, 200))


@given(cases())
def test_parts_tile_the_box_in_c_order_and_keep_to_the_limit(case):
    box, itemsize, limit = case
    parts = cut(box, itemsize, limit)
    order = np.arange(box.numel).reshape(box.sizes)
    inside = [order[part.relative_to(box).slices].ravel() for part in parts]
    # Each part is contiguous in C order, and parts follow one another.
    assert np.concatenate(inside).tolist() == list(range(box.numel))
    assert all(part.numel * itemsize <= max(limit, itemsize) for part in parts)
    assert all(part.within(box.ends) for part in parts)
    if box.numel * itemsize <= limit:
        assert parts == (box,)


def test_only_the_outermost_dimension_is_cut_where_that_is_enough():
    parts = cut(Box((8, 0), (10, 4)), 4, 48)
    assert [str(part) for part in parts] == [
        "[8:10, 0:4]",
        "[10:13, 0:4]",
        "[13:15, 0:4]",
        "[15:18, 0:4]",
    ]
    assert [str(part) for part in cut(Box((0, 0), (2, 8)), 4, 20)] == [
        "[0:1, 0:4]", "[0:1, 4:8]", "[1:2, 0:4]", "[1:2, 4:8]",
    ]  # fmt: skip
