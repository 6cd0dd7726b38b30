"""Byte ranges of boxes, compared with numpy's indexing."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkeep.errors import FormatError
from shardkeep.plan.reads import ChunkSource, block_range, byte_runs, split
from shardkeep.types import Box


@st.composite
def stored(draw):
    """Generate a chunk with any strides in a payload of a file, and a box of the chunk."""
    itemsize = draw(st.sampled_from([1, 2, 4, 16]))
    ndim = draw(st.integers(0, 4))
    sizes = tuple(draw(st.integers(1, 5)) for _ in range(ndim))
    if draw(st.booleans()):  # dense in some order of the dimensions, or with gaps, or expanded
        strides, step = [0] * ndim, itemsize
        for d in draw(st.permutations(range(ndim))):
            strides[d] = draw(st.sampled_from([step, step, step, step + 3, 0]))
            step = max(step, strides[d]) * sizes[d]
    else:
        strides = [draw(st.integers(0, 40)) for _ in range(ndim)]
    before, after = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    first = draw(st.integers(0, 50))
    extent = itemsize + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    payload = (first, before + extent + after)
    offsets = tuple(draw(st.integers(0, n - 1)) for n in sizes)
    wanted = tuple(draw(st.integers(1, n - o)) for n, o in zip(sizes, offsets, strict=True))
    source = ChunkSource("f", first + before, tuple(strides), sizes, itemsize, payload)
    return source, Box(offsets, wanted)


def view(source, file):
    word = f"V{source.itemsize}"
    return np.ndarray(source.sizes, word, file, source.start, source.strides)


def put(found, file, into):
    """Scatter runs as the reader does, using bytes inside of the runs only."""
    outer = [into.shape[d] for d in found.outer]
    for start, index in zip(found.starts.tolist(), np.ndindex(*outer), strict=True):
        place = [slice(None)] * into.ndim
        for d, i in zip(found.outer, index, strict=True):
            place[d] = i
        data = file[start : start + found.span].copy()
        into[(*place, ...)] = np.ndarray(found.sizes, into.dtype, data, 0, found.strides)
        if found.gapless:
            assert into[(*place, ...)].tobytes() == data.tobytes()


@settings(max_examples=300)
@given(stored(), st.integers(0, 30), st.integers(1, 200))
def test_runs_contain_the_box(chunk, gap, limit):
    source, box = chunk
    end = sum(source.payload)
    file = np.random.default_rng(0).integers(0, 256, end, dtype=np.uint8)
    expected = view(source, file)[box.slices].tobytes()
    found = byte_runs(source, box, gap)
    into = np.zeros(box.sizes, f"V{source.itemsize}")
    put(found, file, into)
    assert into.tobytes() == expected
    assert source.payload[0] <= found.starts.min() and found.starts.max() + found.span <= end
    if found.outer:
        step = min(source.strides[d] for d in found.outer)
        assert step - found.span > gap

    into = np.zeros(box.sizes, f"V{source.itemsize}")
    for part, its_runs in split(source, box, gap, limit):
        assert its_runs.span <= max(limit, source.itemsize)
        put(its_runs, file, into[(*part.relative_to(box).slices, ...)])
    assert into.tobytes() == expected


@settings(max_examples=300)
@given(stored(), st.integers(0, 30), st.integers(2, 40), st.integers(4, 8))
def test_parts_fit_with_their_blocks(chunk, gap, block, blocks):
    source, box = chunk
    file = np.random.default_rng(0).integers(0, 256, sum(source.payload), dtype=np.uint8)
    into = np.zeros(box.sizes, f"V{source.itemsize}")
    for part, found in split(source, box, gap, block * blocks, block):
        assert found.gapless == byte_runs(source, part, 1 << 30).gapless or found.outer
        for start in found.starts.tolist():
            low, high = block_range(start, start + found.span, source.payload, block)
            assert high - low <= block * blocks or found.span == source.itemsize
        put(found, file, into[(*part.relative_to(box).slices, ...)])
    assert into.tobytes() == view(source, file)[box.slices].tobytes()


@settings(max_examples=100)
@given(st.integers(0, 99), st.sampled_from([8, 16, 32, 64]), st.integers(1, 40), st.data())
def test_no_block_is_read_twice_where_rows_and_blocks_fall_together(first, width, rows, data):
    low = data.draw(st.integers(0, width - 1))
    box = Box(
        (data.draw(st.integers(0, rows - 1)), low), (1, data.draw(st.integers(1, width - low)))
    )
    box = Box(box.offsets, (rows - box.offsets[0], box.sizes[1]))
    matrix = ChunkSource("f", first, (width, 1), (rows, width), 1, (first, rows * width))
    touched = []
    for _, found in split(matrix, box, 64, 256, 64):
        start, stop = block_range(
            int(found.starts[0]), int(found.starts[0]) + found.span, matrix.payload, 64
        )
        touched += range(start, stop, 64)
    assert len(touched) == len(set(touched))


def source(sizes, strides, start=0, nbytes=10_000, itemsize=4):
    return ChunkSource("f", start, strides, sizes, itemsize, (0, nbytes))


def test_near_runs_are_merged_and_distant_ones_are_not():
    rows = source((10, 100), (400, 4))
    whole = byte_runs(rows, Box((2, 0), (5, 100)), 0)
    assert (whole.starts.tolist(), whole.span, whole.outer) == ([800], 2000, ())
    assert whole.gapless
    columns = Box((2, 10), (5, 50))
    apart = byte_runs(rows, columns, 199)
    assert (apart.starts.tolist(), apart.span) == ([840, 1240, 1640, 2040, 2440], 200)
    assert apart.gapless and apart.outer == (0,)
    joined = byte_runs(rows, columns, 200)
    assert (joined.starts.tolist(), joined.span, joined.gapless) == ([840], 1800, False)


def test_expanded_memory_is_read_once():
    found = byte_runs(source((1000, 8), (0, 4)), Box((5, 1), (900, 6)), 0)
    assert (found.starts.tolist(), found.span, found.outer) == ([4], 24, ())


def test_split_parts_are_as_large_as_the_limit_allows():
    rows = source((10, 100), (800, 4))
    parts = [part for part, _ in split(rows, Box((0, 0), (10, 100)), 400, 2100)]
    assert [part.sizes[0] for part in parts] == [3, 3, 3, 1]
    assert [part.offsets[0] for part in parts] == [0, 3, 6, 9]


@pytest.mark.parametrize(
    ("chunk", "box", "message"),
    [
        (source((4,), (-4,), 100), Box((0,), (4,)), "f: negative stride -4"),
        (
            source((4,), (4,), 9_990),
            Box((0,), (1,)),
            "f: elements at bytes 9990 to 10006 are outside the payload, which is at 0 to 10000",
        ),
        (source((4,), (4,), -1), Box((0,), (4,)), "f: elements at bytes -1 to 15 are outside"),
        (source((4,), (4,)), Box((1,), (4,)), "f: box [1:5] is not in a chunk of (4,)"),
        (source((4,), (4,)), Box((1,), (0,)), "f: box [1:1] is not in a chunk of (4,)"),
        (source((4,), (4,)), Box((-1,), (1,)), "f: box [-1:0] is not in a chunk of (4,)"),
        (source((4,), (4,)), Box((), ()), "f: box [] has other dimensions than a chunk of (4,)"),
        (
            source((5000, 5000), (100_000, 100_000), 0, 10**10),
            Box((0, 0), (5000, 5000)),
            "f: the box has more than 16777216 separate byte ranges",
        ),
    ],
)
def test_contradictory_chunks_are_refused(chunk, box, message):
    with pytest.raises(FormatError) as caught:
        byte_runs(chunk, box, 64)
    assert str(caught.value).startswith(message)


@settings(max_examples=200)
@given(st.integers(0, 100), st.integers(1, 100), st.integers(1, 20), st.data())
def test_ranges_round_out_to_blocks_of_the_payload(first, nbytes, block, data):
    start = data.draw(st.integers(first, first + nbytes - 1))
    stop = data.draw(st.integers(start + 1, first + nbytes))
    low, high = block_range(start, stop, (first, nbytes), block)
    edges = {*range(first, first + nbytes, block), first + nbytes}
    assert low in edges and high in edges
    assert low <= start < low + block
    assert stop <= high < stop + block
    assert prod((low >= first, high <= first + nbytes))
