"""Copies of many ranges at a time, compared with a loop: no other bytes are touched."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkeep.io import scatter_gather
from shardkeep.io.scatter_gather import gather_bytes, scatter_bytes


@st.composite
def things(draw):
    """Generate [N] offsets and sizes of ranges with gaps. Sizes are often equal."""
    count = draw(st.integers(0, 150))
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    chosen = rng.choice(np.array(sizes, np.int64), count)
    step = draw(st.sampled_from([1, 4, 8, 64]))
    room = -(-(chosen + rng.integers(0, 20, count)) // step) * step
    starts = np.cumsum(room) - room + draw(st.integers(0, 1)) * step
    order = rng.permutation(count)
    return starts[order], chosen[order]


def memory(nbytes, seed=0):
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def end(starts, sizes):
    return int((starts + sizes).max(initial=0)) + 100


@settings(max_examples=200)
@given(st.integers(0, 40), st.integers(0, 60), st.sampled_from([1, 4, 8]), st.integers(0, 9))
def test_gathered_bytes_are_those_at_the_addresses(size, count, step, seed):
    rng = np.random.default_rng(seed)
    starts = rng.permutation(np.arange(count) * (-(-size // step) * step + step * seed))
    here, gap = memory(end(starts, np.full(count, size))), int(rng.integers(0, 9))
    nowhere = rng.integers(0, 4, count) == 0
    space = memory(count * (size + gap), 1).reshape(count, size + gap)
    wanted = space.copy()
    for row in np.flatnonzero(~nowhere).tolist():
        wanted[row, :size] = here[starts[row] : starts[row] + size]
    gather_bytes(np.where(nowhere, 0, starts + here.ctypes.data), space[:, :size])
    assert np.array_equal(space, wanted)


@settings(max_examples=200)
@given(things(), st.integers(0, 9))
def test_scattering_changes_no_other_bytes(lying, seed):
    places, sizes = lying
    source = memory(int(sizes.sum()) + 8 * len(sizes) + 8, seed)
    starts = np.cumsum(-(-sizes // 8) * 8) - sizes
    there = memory(end(places, sizes), 1)
    wanted = there.copy()
    for at, start, size in zip(places, starts, sizes, strict=True):
        wanted[at : at + size] = source[start : start + size]
    scatter_bytes(source, starts, sizes, places + there.ctypes.data)
    assert np.array_equal(there, wanted)


def test_ranges_of_equal_size_are_copied_together(monkeypatch):
    """A call for each tensor would cost more than the rest of a save of many small tensors."""
    calls = []
    real = scatter_gather.ctypes.memmove
    monkeypatch.setattr(scatter_gather.ctypes, "memmove", lambda *a: calls.append(a) or real(*a))
    here, there = memory(64 * 1000), memory(64 * 1000, 1)
    starts, sizes = np.arange(1000) * 64, np.where(np.arange(1000) % 3, 24, 64)
    sizes[7] = 13
    gather_bytes(starts + here.ctypes.data, there.reshape(1000, 64)[:, :24])
    assert not calls
    scatter_bytes(here, starts, sizes, starts + there.ctypes.data)
    assert len(calls) == 1
