"""Boxes as users write them, their corners and their parts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkeep.cli.boxes import corner, parse, slabs
from shardkeep.cli.terminal import CommandError
from shardkeep.types import Box

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = draw(shapes)
    ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return shape, Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


@given(boxes())
def test_a_box_reads_back_from_its_own_text(case: tuple[tuple[int, ...], Box]) -> None:
    shape, box = case
    assert parse(str(box)[1:-1], shape) == box


@given(boxes(), st.integers(1, 40))
def test_slabs_cut_a_box_into_parts_that_cover_it_once(
    case: tuple[tuple[int, ...], Box], most: int
) -> None:
    shape, box = case
    seen = np.zeros(shape, dtype=int)
    for part in slabs(box, most):
        assert part.within(shape)
        assert part.numel <= max(most, 1)
        seen[part.slices] += 1
    wanted = np.zeros(shape, dtype=int)
    wanted[box.slices] = 1
    assert np.array_equal(seen, wanted)


@given(boxes(), st.integers(1, 100))
def test_a_corner_is_small_and_inside(case: tuple[tuple[int, ...], Box], most: int) -> None:
    shape, box = case
    part = corner(box, most)
    assert part.within(shape)
    assert part.numel <= most
    assert part.offsets == box.offsets
    assert (part.numel > 0) == (box.numel > 0)


def test_a_corner_of_very_many_dimensions_stays_small() -> None:
    assert corner(Box.whole((2,) * 64), 64).numel == 64


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("", Box((0, 0, 0), (4, 5, 6))),
        ("1", Box((1, 0, 0), (1, 5, 6))),
        ("-1, :, 2:", Box((3, 0, 2), (1, 5, 4))),
        (":2,-3:-1", Box((0, 2, 0), (2, 2, 6))),
        ("2:2", Box((2, 0, 0), (0, 5, 6))),
    ],
)
def test_ranges_are_written_as_in_python(text: str, box: Box) -> None:
    assert parse(text, (4, 5, 6)) == box


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:5", "box '0:5': '0:5' reaches out of a dimension of size 4"),
        ("4", "box '4': '4' reaches out of a dimension of size 4"),
        ("-5", "box '-5': '-5' reaches out of a dimension of size 4"),
        ("3:1", "box '3:1': '3:1' reaches out of a dimension of size 4"),
        ("0:4:2", "box '0:4:2': '0:4:2' is not a range; write 0:4, 4:, :, or 7"),
        ("a", "box 'a': 'a' is not a range; write 0:4, 4:, :, or 7"),
        ("0,", "box '0,' has 2 parts, but the tensor's shape is [4]"),
    ],
)
def test_what_is_no_box_of_the_tensor_is_refused(text: str, message: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse(text, (4,))
    assert str(caught.value) == message
    assert caught.value.code == 2
