"""Layouts of files: items tile the file, and cuts leave windows that can be made independently."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkeep.plan.file_layout import MIN_IN_PLACE_BYTES, MIN_WINDOW_BYTES, lay_out
from shardkeep.settings import ALIGNMENT, BLOCK, PAGE
from shardkeep.types import Frame


class Framing:
    """Frames like those of a container: the head ends where the payload may start."""

    def __init__(self, least, tail):
        self.least, self.tail = least, bytes(tail)

    def __call__(self, position, paged):
        step = PAGE if paged else ALIGNMENT
        return Frame(b"h" * (self.least + -(position + self.least) % step), b"", b"", self.tail)


framings = st.one_of(st.none(), st.builds(Framing, st.integers(1, 3000), st.integers(1, 500)))
kinds = st.lists(framings, min_size=1, max_size=3)
sizes = st.one_of(
    st.integers(0, 200),
    st.integers(0, BLOCK),
    st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 8 * BLOCK, 9 * BLOCK + 7, 40 * BLOCK]),
)


def frame_of(layout, row):
    number = layout.frame[row]
    return None if number < 0 else layout.frames[number]


@settings(max_examples=300)
@given(
    kinds,
    st.lists(
        st.tuples(
            sizes,
            st.integers(0, 2),
            st.integers(0, PAGE // ALIGNMENT - 1),
            st.one_of(st.just(1), st.integers(1, 400)),
        ),
        max_size=60,
    ),
    st.sampled_from([4, 5, 8, 16]),
    st.sampled_from([0, 0, 64, 1000, 3 * BLOCK + 1, 40 * BLOCK]),
)
def test_items_tile_the_file_and_windows_can_be_made_alone(kinds, runs, blocks, start):
    window = blocks * BLOCK
    items = [
        (size, which % len(kinds), at)
        for size, which, at, count in runs
        for _ in range(count if size < 2000 else 1)
    ]
    nbytes = np.array([n for n, *_ in items], dtype=np.int64)
    past = np.array([at * ALIGNMENT for *_, at in items], dtype=np.int64)
    past[nbytes < MIN_IN_PLACE_BYTES] = 0
    kind = np.array([which for _, which, _ in items], dtype=np.int64)
    items = [(size, kinds[which]) for size, which, _ in items]
    layout = lay_out(nbytes, kind, kinds, past, window, start)
    position = start
    for row in layout.order.tolist():
        size, framing = items[row]
        frame = frame_of(layout, row)
        assert layout.item[row] == position
        head = 0 if frame is None else len(frame.head)
        tail = 0 if frame is None else frame.tail_length
        assert (frame is None) == (framing is None)
        assert layout.payload[row] == position + head
        assert layout.length[row] == head + size + tail
        if framing is not None:
            step = PAGE if size >= BLOCK else ALIGNMENT
            assert layout.payload[row] % step == past[row] % step
            paged = layout.payload[row] % PAGE == past[row]
            assert frame in [framing(position - past[row], paged), framing(position, False)]
        position += head + size + tail
    assert layout.nbytes == position
    assert sorted(layout.order.tolist()) == list(range(len(items)))

    cuts = layout.cuts.tolist()
    assert cuts[0] == start and cuts[-1] == position
    spans = np.diff(layout.cuts)
    assert (spans > 0).all() and (spans <= window).all()
    for cut in cuts[1:-1]:
        assert cut % PAGE == 0
        inside = (layout.payload <= cut) & (cut < layout.payload + np.maximum(nbytes, 1))
        (row,) = np.flatnonzero(inside).tolist()
        if frame_of(layout, row) is not None:
            into = cut - layout.payload[row] + past[row]
            assert into % BLOCK == 0
            assert into > 0 or not past[row]


@given(st.integers(0, 3000), st.integers(1, 3000))
@settings(max_examples=30)
def test_windows_are_few_however_small_the_items_are(size, count):
    none = np.zeros(count, np.int64)
    layout = lay_out(np.full(count, size), none, [Framing(400, 300)], none, 8 * BLOCK)
    assert len(layout.cuts) - 1 <= layout.nbytes / (2 * BLOCK) + 1
    frames = layout.nbytes - size * count
    # Padding to a page is rare, and padding to ALIGNMENT is small.
    assert frames <= count * (708 + ALIGNMENT) + PAGE * (len(layout.cuts) + 1)


def test_large_items_come_first_then_small_ones_by_kind_and_bare_ones_last():
    nbytes = np.array([5, 3 * BLOCK, 7, 2 * BLOCK, 9, 4, 5])
    kind = np.array([1, 1, 2, 0, 0, 1, 0])
    kinds = [Framing(10, 10), Framing(20, 10), None]
    layout = lay_out(nbytes, kind, kinds, np.zeros(7, np.int64), MIN_WINDOW_BYTES)
    assert layout.order.tolist() == [1, 3, 4, 6, 0, 5, 2]


def test_equal_items_share_one_or_two_frames():
    """A call for each of many small tensors would take longer than writing them."""
    calls = []

    def framing(position, paged):
        calls.append(paged)
        return Framing(400, 300)(position, paged)

    count = 20_000
    none = np.zeros(count, np.int64)
    layout = lay_out(np.full(count, 64), none, [framing], none, 8 * BLOCK)
    assert len(calls) <= 3 * calls.count(True) + 3 < count / 300
    assert len(layout.cuts) > 4


def test_a_window_too_small_to_cut_is_refused():
    none = np.zeros(0, np.int64)
    with pytest.raises(ValueError, match="limited to 1048576 bytes or more, not 4096"):
        lay_out(none, none, [], none, 4096)


def test_a_small_payload_must_start_at_a_page():
    nbytes, past = np.array([MIN_IN_PLACE_BYTES, MIN_IN_PLACE_BYTES - 1]), np.array([64, 64])
    with pytest.raises(
        ValueError, match="a payload of less than 524288 bytes must start at a multiple of 4096"
    ):
        lay_out(nbytes, np.zeros(2, np.int64), [Framing(10, 10)], past, MIN_WINDOW_BYTES)
