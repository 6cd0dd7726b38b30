"""Rounds of boxes through a small memory: each element once, and no overlap within a round."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkeep.plan import rounds as module
from shardkeep.plan.rounds import plan_rounds
from shardkeep.settings import ALIGNMENT
from shardkeep.types import Box

boxes = st.lists(
    st.tuples(
        st.lists(st.integers(0, 9), max_size=3).map(tuple).map(Box.whole),
        st.sampled_from([1, 2, 4, 8, 16]),
    ),
    max_size=8,
)


@settings(max_examples=300)
@given(boxes, st.integers(1, 32), st.integers(16, 512))
def test_parts_tile_boxes_and_fit_into_half_of_the_room(given_boxes, units, most):
    room = units * 2 * ALIGNMENT
    asked = [(row, box, itemsize) for row, (box, itemsize) in enumerate(given_boxes)]
    before, module._MOST = module._MOST, most
    try:
        rounds = plan_rounds(asked, room)
    finally:
        module._MOST = before
    seen = [np.zeros(box.sizes, int) for _, box, _ in asked]
    for number, parts in enumerate(rounds):
        assert parts
        end = number % 2 * room // 2
        last = end + room // 2
        for row, inside, start, nbytes in parts:
            assert start >= end and start % ALIGNMENT == 0
            end = start + nbytes
            assert nbytes == inside.numel * asked[row][2] <= min(room // 2, most)
            seen[row][inside.slices] += 1
        assert end <= last
    assert all((array == 1).all() for array in seen)
    rows = [part.row for parts in rounds for part in parts]
    assert rows == sorted(rows)


def test_a_round_contains_all_that_fits():
    small = [(row, Box.whole((100,)), 1) for row in range(20)]
    rounds = plan_rounds(small, 2048)
    assert [len(parts) for parts in rounds] == [8, 8, 4]
    assert [parts[0].start for parts in rounds] == [0, 1024, 0]
