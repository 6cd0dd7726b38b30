"""Staged payloads have checksums and an alignment for direct writes, after a single copy."""

from __future__ import annotations

import ctypes
import zlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkeep.io.arena import allocate_pages
from shardkeep.io.write.staging import StagingLayout, stage_payloads
from shardkeep.io.write.windows import LIGHT_BYTES
from shardkeep.settings import BLOCK, PAGE


class Memory:
    """Payloads of random bytes, each at an offset from a page, or without an address for None."""

    def __init__(self, sizes, past):
        rng = np.random.default_rng(len(sizes))
        self.data = []
        for size, at in zip(sizes, past, strict=True):
            block = allocate_pages(size + PAGE)[at or 0 :][:size]
            block[:] = np.frombuffer(rng.bytes(size), np.uint8)
            self.data.append(block)
        known = zip(self.data, past, strict=True)
        at = [0 if at is None else block.ctypes.data for block, at in known]
        self.addresses = np.array(at, np.int64)
        self.asked = np.zeros(len(sizes), np.int64)

    def copy(self, row, start, nbytes, address):
        self.asked[row] += nbytes
        part = self.data[row][start : start + nbytes]
        assert part.nbytes == nbytes
        ctypes.memmove(address, part.ctypes.data, nbytes)


lying = st.lists(
    st.tuples(
        st.one_of(
            st.integers(0, 300),
            st.sampled_from(
                [LIGHT_BYTES, LIGHT_BYTES + 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 5 * BLOCK + 3]
            ),
        ),
        st.one_of(st.none(), st.sampled_from([0, 16, 64, 512, 4032, PAGE - 1])),
    ),
    max_size=12,
)


@settings(max_examples=60)
@given(lying, st.integers(1, 3))
def test_payloads_are_staged_once_with_checksums_and_large_ones_keep_their_alignment(
    lying, threads
):
    sizes, past = [size for size, _ in lying], [at for _, at in lying]
    source = Memory(sizes, past)
    places = StagingLayout(source, np.array(sizes, np.int64))
    memory = allocate_pages(places.nbytes)
    staged = stage_payloads(source, places, memory, threads=threads)
    assert source.asked.tolist() == sizes

    wanted = [bytes(data) for data in source.data]
    for data in source.data:
        data[:] = 0  # later changes must not matter
    got = []
    for row, size in enumerate(sizes):
        copy = ctypes.create_string_buffer(size + 1)
        staged.copy(row, 0, size, ctypes.addressof(copy))
        got.append(copy.raw[:size])
        if size > LIGHT_BYTES:
            at = int(staged.addresses[row])
            blocks = range(0, size, BLOCK)
            checksums = [zlib.crc32(wanted[row][i : i + BLOCK]) for i in blocks]
            assert staged.checksums(row, 0, size, at) == checksums
            assert staged.checksums(row, BLOCK, size - BLOCK, at + BLOCK) == checksums[1:]
    assert got == wanted
    assert list(map(ctypes.string_at, staged.addresses.tolist(), sizes)) == wanted

    for row, (size, at) in enumerate(lying):
        begin = places.starts[row]
        assert 0 <= begin <= begin + size <= places.nbytes
        if size >= 2 * BLOCK:
            assert begin % PAGE == (at if at is not None and at % 64 == 0 else 0)
    more = sum(PAGE if size >= 2 * BLOCK else 64 for size in sizes)
    assert places.nbytes <= sum(sizes) + 2 * more
    begins = places.starts
    spans = sorted(zip(begins.tolist(), (begins + np.array(sizes, np.int64)).tolist(), strict=True))
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_an_error_of_a_payload_is_raised_by_staging(monkeypatch):
    source = Memory([100, 3 * BLOCK, 200], [0, 64, 0])

    def broken(row, start, nbytes, address):
        raise RuntimeError(f"no memory at {start}")

    monkeypatch.setattr(source, "copy", broken)
    places = StagingLayout(source, np.array([100, 3 * BLOCK, 200], np.int64))
    with pytest.raises(RuntimeError, match="no memory at"):
        stage_payloads(source, places, allocate_pages(places.nbytes), threads=2)
