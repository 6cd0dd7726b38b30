"""Reads of small payloads as columns, compared with the general way: bytes, errors and reads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkeep.errors import Damaged
from shardkeep.io.checksums import block_checksums, crc32
from shardkeep.io.read.copies import ChunkCopy, read_copies
from shardkeep.io.read.small import SmallPayloads, merge_small_reads, read_small, sorted_by_place
from shardkeep.plan.reads import ChunkSource
from shardkeep.settings import BLOCK
from shardkeep.stores.memory import MemoryStore
from shardkeep.types import Box

FILES = {name: np.random.default_rng(seed).bytes(3 * BLOCK) for seed, name in enumerate("ba")}
NAMES = list(FILES)
GAP = 4096


class Counting(MemoryStore):
    """A store that holds the files and records reads."""

    def __init__(self, files):
        super().__init__()
        self.reads = []
        for name, data in files.items():
            self.put(name, data, mode="replace")

    def read_into(self, name, offset, buffer):
        self.reads.append((name, offset, offset + buffer.nbytes))
        return super().read_into(name, offset, buffer)


places = st.tuples(
    st.integers(0, 1),
    st.one_of(st.integers(0, 2000), st.integers(0, 2 * BLOCK)),
    st.one_of(st.integers(1, 100), st.sampled_from([BLOCK, BLOCK - 1, 4096])),
    st.booleans(),
)
"""File, first byte, number of bytes, and whether there is a checksum."""


def columns(wanted, space):
    """Return the payloads as columns, to be read into `space` one after the other."""
    file, start, nbytes, checksummed = (np.array(column) for column in zip(*wanted, strict=True))
    parts = [FILES[NAMES[f]][s : s + n] for f, s, n, _ in wanted]
    return SmallPayloads(
        names=[f"t{i}" for i in range(len(wanted))],
        tensor=np.arange(len(wanted)),
        files=NAMES,
        file=file,
        start=start,
        nbytes=nbytes,
        crc=np.where(checksummed, [crc32(part) for part in parts], -1),
        into=space.ctypes.data + np.cumsum(nbytes) - nbytes,
    )


def copies(wanted, space):
    """Return the same payloads for the general way."""
    found, at = [], 0
    for row, (f, start, nbytes, checksummed) in enumerate(wanted):
        checksums = (
            block_checksums(FILES[NAMES[f]][start : start + nbytes]) if checksummed else None
        )
        source = ChunkSource(NAMES[f], start, (1,), (nbytes,), 1, (start, nbytes), checksums)
        found.append(ChunkCopy(f"t{row}", source, Box((0,), (nbytes,)), space[at : at + nbytes]))
        at += nbytes
    return found


def fast(store, wanted, space, **options):
    small = sorted_by_place(columns(wanted, space))
    return read_small(store, small, merge_small_reads(small, GAP), **options)


@settings(max_examples=150)
@given(st.lists(places, min_size=1, max_size=30), st.booleans(), st.integers(1, 3))
def test_every_payload_is_read(wanted, verify, threads):
    store, space = Counting(FILES), np.zeros(sum(place[2] for place in wanted), np.uint8)
    told = []
    read = fast(
        store,
        wanted,
        space,
        verify=verify,
        threads=threads,
        progress=lambda *what: told.append(what),
    )
    assert space.tobytes() == b"".join(FILES[NAMES[f]][s : s + n] for f, s, n, _ in wanted)
    assert read == sum(high - low for _, low, high in store.reads)
    assert max(told) == ("read", read, read)
    assert len(told) == len(store.reads)


@settings(max_examples=300)
@given(st.lists(places, min_size=1, max_size=12), st.booleans(), st.data())
def test_errors_are_those_of_the_general_way(wanted, verify, data):
    files = {name: bytearray(content) for name, content in FILES.items()}
    f, start, nbytes, _ = data.draw(st.sampled_from(wanted))
    how = data.draw(st.sampled_from(["flip", "cut", "gone"]))
    if how == "flip":
        files[NAMES[f]][start + data.draw(st.integers(0, nbytes - 1))] ^= 1
    elif how == "cut":
        del files[NAMES[f]][start + data.draw(st.integers(0, nbytes)) :]
    else:
        del files[NAMES[f]]
    size = sum(place[2] for place in wanted)
    outcomes = []
    for way in ("general", "columns"):
        space = np.zeros(size, np.uint8)
        store = Counting(files)
        try:
            if way == "general":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("SHARDKEEP_READ_GAP_BYTES", str(GAP))
                    read_copies(store, copies(wanted, space), verify=verify, threads=1)
            else:
                fast(store, wanted, space, verify=verify, threads=1)
            outcomes.append(space.tobytes())
        except Damaged as error:
            outcomes.append((str(error), error.file, error.name, error.block))
    assert outcomes[0] == outcomes[1]


def test_neighbours_share_a_read():
    wanted = [(0, 100 + 64 * i, 64, True) for i in range(2000)]
    store, space = Counting(FILES), np.zeros(64 * 2000, np.uint8)
    assert fast(store, wanted[::-1], space, threads=4) == 64 * 2000
    assert store.reads == [("b", 100, 100 + 64 * 2000)]


def test_reads_end_at_gaps_and_at_the_size_limit():
    far = [(0, 0, 10, False), (0, 10 + GAP, 10, False), (0, 21 + 2 * GAP, 10, False)]
    small = sorted_by_place(columns(far, np.zeros(30, np.uint8)))
    assert [read[1:3] for read in merge_small_reads(small, GAP)] == [
        (0, 20 + GAP),
        (21 + 2 * GAP, 31 + 2 * GAP),
    ]
    many = 40
    row = np.arange(many)
    zero = row * 0
    wide = SmallPayloads(["t"], ["f"], zero, zero, row * BLOCK, zero + BLOCK, zero - 1, zero)
    found = merge_small_reads(wide, GAP)
    assert [read.last for read in found] == list(range(4, many + 1, 4))
    assert all(read.high - read.low == 4 * BLOCK for read in found)


def test_reading_no_payloads_is_valid():
    none = np.zeros(0, np.int64)
    small = sorted_by_place(SmallPayloads([], [], none, none, none, none, none, none))
    assert merge_small_reads(small, GAP) == []
    assert read_small(MemoryStore(), small, [], threads=2) == 0
