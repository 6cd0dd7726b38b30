"""Reads of boxes, compared with numpy's indexing, and every kind of damage to their files."""

from __future__ import annotations

import threading
import time
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkeep.errors import Damaged, FormatError
from shardkeep.io.checksums import block_checksums
from shardkeep.io.read.copies import ChunkCopy, read_copies
from shardkeep.plan.reads import ChunkSource
from shardkeep.settings import BLOCK
from shardkeep.stores.local.store import LocalStore
from shardkeep.stores.memory import MemoryStore
from shardkeep.types import Box


class Logging(MemoryStore):
    """A store that records reads."""

    def __init__(self, **files):
        super().__init__()
        self.reads = []
        for name, data in files.items():
            self.put(name, data, mode="replace")

    def read_into(self, name, offset, buffer):
        self.reads.append((name, offset, offset + buffer.nbytes))
        return super().read_into(name, offset, buffer)


class InSteps(Logging):
    """A store that reports progress in steps of any size, and reads rows only at times."""

    def __init__(self, seed, **files):
        super().__init__(**files)
        self.random, self.kept = np.random.default_rng(seed), []

    def read_steps(self, name, offset, buffer, step, *, keep=False):
        self.reads.append((name, offset, offset + buffer.nbytes))
        self.kept.append(keep)
        data = super().get_range(name, offset, buffer.nbytes)
        # Bytes that have not been reported yet must not be used.
        buffer[:] = b"\xee" * buffer.nbytes
        done = 0
        while done < len(data):
            end = min(len(data), done + 1 + int(self.random.integers(2 * step)))
            buffer[done:end] = data[done:end]
            done = end
            yield done

    def read_rows(self, name, starts, into):
        into[...] = 0xEE
        if self.random.integers(2):
            return False
        for start, row in zip(starts.tolist(), into, strict=True):
            if Logging.read_into(self, name, start, row.data) < len(row):
                return False
        return True


FILE = np.random.default_rng(0).bytes(16 * BLOCK)


def checksums(first, nbytes):
    return block_checksums(FILE[first : first + nbytes])


def stored(source):
    return np.ndarray(source.sizes, f"V{source.itemsize}", FILE, source.start, source.strides)


def spread(shape, itemsize, draw):
    """Return an array with any strides: permuted dimensions, and gaps between elements."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 2)) for _ in shape]
    room = np.zeros([shape[d] * steps[d] for d in order], f"V{itemsize}")
    part = room[tuple(slice(None, None, steps[d]) for d in order)]
    return part.transpose(np.argsort(order)) if len(shape) else room[...]


@st.composite
def copies(draw):
    """Generate any copy out of a payload of several blocks."""
    itemsize = draw(st.sampled_from([1, 2, 4, 8, 16]))
    ndim = draw(st.integers(0, 3))
    big = draw(st.booleans())
    sizes = [draw(st.integers(1, 6)) for _ in range(ndim)]
    if big and ndim:
        sizes[draw(st.integers(0, ndim - 1))] = draw(st.sampled_from([1000, 70_000]))
    strides, step = [0] * ndim, itemsize
    for d in draw(st.permutations(range(ndim))):
        strides[d] = draw(st.sampled_from([step, step, step + 24, step + BLOCK // 8 * 8, 0]))
        step = max(step, strides[d]) * sizes[d]
    extent = itemsize + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    if extent > 10 * BLOCK:
        strides = [0 if s > itemsize * 70_000 // 8 else s for s in strides]
        extent = itemsize + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        if extent > 10 * BLOCK:
            strides, extent = [0] * ndim, itemsize
    first = draw(st.integers(0, 3 * BLOCK))
    before = draw(st.sampled_from([0, 0, 5, BLOCK, BLOCK + 3]))
    nbytes = before + extent + draw(st.sampled_from([0, 0, 9, 2 * BLOCK]))
    offsets = [draw(st.integers(0, n - 1)) if draw(st.booleans()) else 0 for n in sizes]
    wanted = [
        draw(st.integers(1, n - o)) if draw(st.booleans()) else n - o
        for n, o in zip(sizes, offsets, strict=True)
    ]
    start, data = first + before, None
    payload, crcs = (first, nbytes), checksums(first, nbytes) if draw(st.booleans()) else None
    if draw(st.integers(0, 4)) == 0:
        data = memoryview(FILE[first : first + nbytes])
        start, payload = before, (0, nbytes)
    source = ChunkSource("f", start, tuple(strides), tuple(sizes), itemsize, payload, crcs, data)
    box = Box(tuple(offsets), tuple(wanted))
    return ChunkCopy("t", source, box, spread(box.sizes, itemsize, draw)), first


def expected(copy, first):
    source = copy.source
    shift = first if source.data is not None else 0
    plain = ChunkSource(
        "f", source.start + shift, source.strides, source.sizes, source.itemsize, (0, 0)
    )
    return stored(plain)[(*copy.box.slices, ...)].tobytes()


@settings(max_examples=200)
@given(
    st.lists(copies(), max_size=4),
    st.booleans(),
    st.integers(1, 4),
    st.sampled_from([0, 64, 1 << 16, 1 << 20]),
    st.one_of(st.none(), st.integers(0, 99)),
)
def test_every_box_is_read(wanted, verify, threads, gap, steps):
    store = Logging(f=FILE) if steps is None else InSteps(steps, f=FILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDKEEP_READ_GAP_BYTES", str(gap))
        patch.setenv("SHARDKEEP_MAX_HOST_MEMORY_BYTES", str(1 << 20))
        found = read_copies(store, [copy for copy, _ in wanted], verify=verify, threads=threads)
    for copy, first in wanted:
        assert copy.into.tobytes() == expected(copy, first)
    assert found.bytes_read == sum(high - low for _, low, high in store.reads)
    assert found.bytes_needed == sum(copy.into.nbytes for copy, _ in wanted)


@settings(max_examples=120)
@given(copies(), st.integers(1, 3), st.sampled_from(["plain", "steps"]), st.data())
def test_a_flipped_bit_is_found_whenever_its_block_is_read(wanted, threads, kind, data):
    copy, first = wanted
    source, nbytes = copy.source, copy.source.payload[1]
    good = checksums(first, nbytes)
    # The first byte of any element of the box, at its offset in the file.
    index = [
        data.draw(st.integers(low, high - 1))
        for low, high in zip(copy.box.offsets, copy.box.ends, strict=True)
    ]
    at = source.start + sum(i * s for i, s in zip(index, source.strides, strict=True))
    at += data.draw(st.integers(0, source.itemsize - 1))
    broken = bytearray(FILE)
    memory = None
    if source.data is not None:
        memory = bytearray(source.data)
        memory[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        broken[at] ^= 1 << data.draw(st.integers(0, 7))
    damaged = ChunkSource(
        "f", source.start, source.strides, source.sizes, source.itemsize, source.payload, good,
        memoryview(memory) if memory is not None else None,
    )  # fmt: skip
    stores = {"plain": Logging, "steps": partial(InSteps, 0)}
    with pytest.raises(Damaged) as caught:
        read_copies(
            stores[kind](f=broken),
            [ChunkCopy("the.name", damaged, copy.box, copy.into)],
            threads=threads,
        )
    block = (at - source.payload[0]) // BLOCK
    assert (caught.value.file, caught.value.name, caught.value.block) == ("f", "the.name", block)
    assert str(caught.value).startswith(f"f, 'the.name', block {block}: its bytes have CRC-32 ")
    read_copies(
        Logging(f=broken), [ChunkCopy("t", damaged, copy.box, copy.into)], threads=1, verify=False
    )


def flat(first, count, *, name="t", dtype=np.uint8, checked=True, into=None):
    """Return a copy of a whole payload."""
    into = np.zeros(count, dtype) if into is None else into
    nbytes = into.nbytes
    crcs = checksums(first, nbytes) if checked else None
    source = ChunkSource(
        "f", first, (into.itemsize,), (count,), into.itemsize, (first, nbytes), crcs
    )
    return ChunkCopy(name, source, Box((0,), (count,)), into)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [1, 1000, BLOCK, 9 * BLOCK + 5])
@pytest.mark.parametrize("steps", [True, False])
def test_a_file_that_ends_early_is_damaged(count, threads, checked, steps):
    cut = FILE[: 100 + count - 1]
    store = InSteps(1, f=cut) if steps else Logging(f=cut)
    with pytest.raises(Damaged) as caught:
        read_copies(store, [flat(100, count, checked=checked)], threads=threads)
    assert (caught.value.file, caught.value.name) == ("f", "t")
    assert f"the file ends at byte {100 + count - 1}, but its data go on to" in str(caught.value)
    assert not [t for t in threading.enumerate() if t.name.startswith("shardkeep-io")]


def test_the_error_names_the_tensor_that_is_cut():
    store = Logging(f=FILE[:1000])
    wanted = [flat(100, 50, name="whole"), flat(990, 50, name="cut"), flat(2000, 9, name="gone")]
    with pytest.raises(Damaged) as caught:
        read_copies(store, wanted, threads=1)
    assert caught.value.name == "cut"
    assert len(store.reads) == 1


@pytest.mark.parametrize("count", [10, 9 * BLOCK])
def test_missing_files(count):
    with pytest.raises(Damaged) as caught:
        read_copies(Logging(), [flat(0, count, name="a.b")], threads=4)
    assert str(caught.value) == "f, 'a.b': the file is missing"


def test_a_payload_in_memory_that_ends_early_is_damaged():
    source = ChunkSource("f", 0, (1,), (50,), 1, (0, 50), None, memoryview(FILE[:49]))
    with pytest.raises(Damaged, match="f, 't': the file ends at byte 49, but its data go on to 50"):
        read_copies(
            Logging(), [ChunkCopy("t", source, Box((0,), (2,)), np.zeros(2, "u1"))], threads=1
        )


def test_small_tensors_share_reads():
    store = Logging(f=FILE)
    wanted = [flat(at, 64) for at in range(0, 2 * BLOCK, 1000)]
    found = read_copies(store, wanted, threads=2)
    assert len(store.reads) == 1
    assert found.bytes_needed == 64 * len(wanted)
    assert all(c.into.tobytes() == FILE[c.source.start :][:64] for c in wanted)


def test_far_ranges_are_not_read(monkeypatch):
    monkeypatch.setenv("SHARDKEEP_READ_GAP_BYTES", "4096")
    store = Logging(f=FILE)
    found = read_copies(store, [flat(0, 64), flat(2 * BLOCK, 64)], threads=1)
    assert found.bytes_read == 128


@pytest.mark.parametrize("checked", [True, False])
def test_whole_payloads_are_read_in_place_and_only_once(checked):
    store = Logging(f=FILE)
    copy = flat(77, 10 * BLOCK + 9, checked=checked)
    found = read_copies(store, [copy], threads=2)
    assert copy.into.tobytes() == FILE[77 : 77 + 10 * BLOCK + 9]
    assert found.bytes_read == found.bytes_needed == 10 * BLOCK + 9


@pytest.mark.parametrize("start", [0, 1, BLOCK, BLOCK + 7])
@pytest.mark.parametrize("stop", [5 * BLOCK, 6 * BLOCK - 1, 6 * BLOCK + 1, 10 * BLOCK + 9])
@pytest.mark.parametrize("damage", [False, True])
def test_parts_of_a_payload_are_read_by_whole_blocks(start, stop, damage):
    whole = flat(77, 10 * BLOCK + 9)
    into = np.zeros(stop - start, np.uint8)
    data = bytearray(FILE)
    if damage:
        data[77 + (stop - 1) // BLOCK * BLOCK] ^= 1
    store = Logging(f=data)
    part = ChunkCopy("t", whole.source, Box((start,), into.shape), into)
    if damage:
        with pytest.raises(Damaged, match=f"block {(stop - 1) // BLOCK}:"):
            read_copies(store, [part], threads=1)
        return
    found = read_copies(store, [part], threads=1)
    assert into.tobytes() == FILE[77 + start : 77 + stop]
    low, high = start // BLOCK * BLOCK, min(-(-stop // BLOCK) * BLOCK, 10 * BLOCK + 9)
    assert (found.bytes_read, found.bytes_needed) == (high - low, stop - start)


def test_rows_that_share_blocks_are_read_once(monkeypatch):
    monkeypatch.setenv("SHARDKEEP_READ_GAP_BYTES", "0")
    store = Logging(f=FILE)
    sizes = (80, BLOCK // 8)
    nbytes = sizes[0] * sizes[1]
    source = ChunkSource("f", 0, (sizes[1], 1), sizes, 1, (0, nbytes), checksums(0, nbytes))
    into = np.zeros((80, 64), np.uint8)
    found = read_copies(store, [ChunkCopy("t", source, Box((0, 0), into.shape), into)], threads=1)
    assert into.tobytes() == stored(source)[:, :64].tobytes()
    assert nbytes - BLOCK < found.bytes_read <= nbytes + 2 * BLOCK


def test_neighbouring_parts_of_a_payload_check_a_shared_block_once(monkeypatch):
    import shardkeep.io.read.copies as module

    checked = []
    real = module.crc32_at
    monkeypatch.setattr(
        module, "crc32_at", lambda at, view: checked.append(len(view)) or real(at, view)
    )
    store = Logging(f=FILE)
    whole = flat(0, 2 * BLOCK)
    wanted = [
        ChunkCopy("t", whole.source, Box((at,), (1000,)), np.zeros(1000, np.uint8))
        for at in range(0, 2 * BLOCK - 1000, 1000)
    ]
    read_copies(store, wanted, threads=1)
    assert checked == [BLOCK, BLOCK]
    assert len(store.reads) == 1


def test_distant_rows_are_read_in_place():
    """Half of each row of a wide matrix, into an array of its own."""
    store = Logging(f=FILE)
    source = ChunkSource("f", 8, (4 * BLOCK, 1), (3, 4 * BLOCK), 1, (8, 12 * BLOCK))
    into = np.zeros((3, 2 * BLOCK), np.uint8)
    found = read_copies(
        store, [ChunkCopy("t", source, Box((0, BLOCK), into.shape), into)], threads=2
    )
    assert into.tobytes() == stored(source)[:, BLOCK : 3 * BLOCK].tobytes()
    assert found.bytes_read == found.bytes_needed == 6 * BLOCK
    assert len(store.reads) == 3


def columns(rows, width, low, high, *, first=64, checked=True, shared=False):
    """Return a copy of some columns of a matrix of bytes."""
    crcs = checksums(first, rows * width) if checked else None
    source = ChunkSource("f", first, (width, 1), (rows, width), 1, (first, rows * width), crcs)
    into = np.zeros((rows, high - low), np.uint8)
    return ChunkCopy("t", source, Box((0, low), into.shape), into, shared)


@pytest.mark.parametrize("checked", [True, False])
def test_columns_take_few_reads_and_no_block_twice(checked):
    """A quarter of each row: every block is read and checked once."""
    store = Logging(f=FILE)
    copy = columns(14 * BLOCK // 4096, 4096, 1024, 2048, checked=checked)
    found = read_copies(store, [copy], threads=4)
    assert copy.into.tobytes() == stored(copy.source)[:, 1024:2048].tobytes()
    assert found.bytes_needed == copy.into.nbytes
    assert found.bytes_read <= 14 * BLOCK
    assert len(store.reads) == 1


def test_columns_within_a_small_budget_read_no_block_twice(monkeypatch):
    import shardkeep.io.read.copies as module

    checked = []
    real = module.crc32_at
    monkeypatch.setattr(
        module, "crc32_at", lambda at, view: checked.append(len(view)) or real(at, view)
    )
    monkeypatch.setenv("SHARDKEEP_MAX_HOST_MEMORY_BYTES", str(1 << 20))
    store = Logging(f=FILE)
    wanted = [columns(14 * BLOCK // 4096, 4096, low, low + 1024) for low in (0, 1024)]
    read_copies(store, wanted[:1], threads=4)
    assert sum(high - low for _, low, high in store.reads) == 14 * BLOCK
    assert len(store.reads) == 4, "of a MiB each"
    assert checked == [BLOCK] * 14


def test_a_column_slice_reads_little_more_than_it_needs():
    """Verified reads are rounded out to blocks, and others read the needed bytes only."""
    wide, low = BLOCK, BLOCK // 2
    for checked, most in ((False, 1000), (True, BLOCK)):
        store = Logging(f=FILE)
        copy = columns(8, wide, low, low + 1000, checked=checked)
        found = read_copies(store, [copy], threads=2)
        assert copy.into.tobytes() == stored(copy.source)[:, low : low + 1000].tobytes()
        assert found.bytes_read == sum(high - low for _, low, high in store.reads) <= 8 * most


def test_only_bytes_that_other_processes_need_stay_in_the_cache():
    whole, half = flat(0, 9 * BLOCK), columns(3 * BLOCK // 4096, 4096, 0, 2048, first=9 * BLOCK)
    quarter = columns(BLOCK // 4096, 4096, 0, 1000, first=13 * BLOCK)
    for wanted, kept in (
        ([whole], {False}),
        ([half], {False}),
        ([quarter], {True}),
        ([ChunkCopy("t", whole.source, whole.box, whole.into, shared=True)], {True}),
        ([ChunkCopy("t", half.source, half.box, half.into, shared=True)], {True}),
    ):
        store = InSteps(0, f=FILE)
        read_copies(store, wanted, threads=1)
        assert set(store.kept) == kept


@pytest.mark.parametrize("checked", [True, False])
def test_large_payloads_are_read_in_calls_of_4_mib(checked):
    """The cost of a call in Python must be small compared to that of its bytes."""
    store = Logging(f=FILE)
    read_copies(store, [flat(0, 16 * BLOCK, checked=checked)], threads=4)
    assert len(store.reads) == 1
    assert store.reads[0] == ("f", 0, 16 * BLOCK)


@pytest.mark.parametrize("verify", [True, False])
def test_uncached_files_are_read_directly(tmp_path, monkeypatch, verify):
    from shardkeep.stores.local import direct_reads, syscalls

    monkeypatch.setattr(syscalls, "cached", lambda fd, offset, length: 0)
    opened = []
    monkeypatch.setattr(
        direct_reads.ColdReads, "read", _noting(direct_reads.ColdReads.read, opened)
    )
    (tmp_path / "f").write_bytes(FILE)
    wanted = [flat(77, 9 * BLOCK + 5), columns(5 * BLOCK // 512, 512, 3, 500, first=10 * BLOCK)]
    read_copies(LocalStore(tmp_path), wanted, threads=2, verify=verify)
    assert wanted[0].into.tobytes() == FILE[77 : 77 + 9 * BLOCK + 5]
    assert wanted[1].into.tobytes() == stored(wanted[1].source)[:, 3:500].tobytes()
    assert len(opened) == (2 if direct_reads.FLAG else 0)
    (tmp_path / "f").write_bytes(FILE[: 77 + 9 * BLOCK])
    with pytest.raises(Damaged, match="the file ends at byte"):
        read_copies(LocalStore(tmp_path), wanted[:1], threads=2, verify=verify)
    broken = bytearray(FILE)
    broken[77 + 3 * BLOCK] ^= 8
    (tmp_path / "f").write_bytes(broken)
    if verify:
        with pytest.raises(Damaged, match="f, 't', block 3: its bytes have CRC-32"):
            read_copies(LocalStore(tmp_path), wanted[:1], threads=2)


def _noting(real, made):
    return lambda *what: made.append(what) or real(*what)


@pytest.mark.parametrize("end", ["whole", "cut", "gone"])
def test_distant_rows_are_read_with_one_call_each_and_no_buffer(tmp_path, monkeypatch, end):
    """Part of each wide row, unverified: only the needed bytes are read, directly into place."""
    import os

    from shardkeep.io.read.copies import _Worker
    from shardkeep.stores.local import syscalls

    monkeypatch.setattr(syscalls, "cached", lambda fd, offset, length: length)
    made = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: made.append(at) or real(fd, to, at))
    buffers = []
    monkeypatch.setattr(_Worker, "_buffer", _noting(_Worker._buffer, buffers))
    (tmp_path / "f").write_bytes(FILE)
    copy = columns(100, 40_000, 5000, 12_000, checked=False)
    last = copy.source.start + 99 * 40_000 + 5000
    if end == "cut":
        os.truncate(tmp_path / "f", last + 6999)
    elif end == "gone":
        (tmp_path / "f").unlink()
    if end != "whole":
        told = "the file ends at byte" if end == "cut" else "f, 't': the file is missing"
        with pytest.raises(Damaged, match=told):
            read_copies(LocalStore(tmp_path), [copy], threads=2)
        return
    found = read_copies(LocalStore(tmp_path), [copy], threads=2)
    assert copy.into.tobytes() == stored(copy.source)[:, 5000:12_000].tobytes()
    assert found.bytes_read == found.bytes_needed == 700_000
    assert sorted(made) == list(range(copy.source.start + 5000, last + 1, 40_000))
    assert not buffers


def test_uncached_rows_are_read_together_with_their_gaps(tmp_path, monkeypatch):
    from shardkeep.stores.local import syscalls

    monkeypatch.setattr(syscalls, "cached", lambda fd, offset, length: 0)
    (tmp_path / "f").write_bytes(FILE)
    copy = columns(100, 40_000, 5000, 12_000, checked=False)
    found = read_copies(LocalStore(tmp_path), [copy], threads=2)
    assert copy.into.tobytes() == stored(copy.source)[:, 5000:12_000].tobytes()
    assert found.bytes_read == 99 * 40_000 + 7000


def test_elements_are_copied_without_conversion():
    """Signalling NaNs, padding bits and dtypes of the same size are preserved."""
    raw = np.array([0x7F81, 0xFF85, 0x0001, 0x8000], np.uint16)
    store = Logging(f=raw.tobytes())
    source = ChunkSource("f", 0, (4, 2), (2, 2), 2, (0, 8))
    for dtype in (ml_dtypes.bfloat16, np.float16, np.int16, "V2"):
        into = np.zeros((2, 2), dtype).T
        read_copies(store, [ChunkCopy("t", source, Box((0, 0), (2, 2)), into)], threads=1)
        assert into.tobytes() == raw.tobytes()


def test_scalars_and_empty_boxes():
    store = Logging(f=FILE)
    scalar = np.zeros((), np.int64)
    source = ChunkSource("f", 16, (), (), 8, (16, 8), checksums(16, 8))
    empty = ChunkSource("gone", 0, (4, 4), (0, 3), 4, (0, 0), np.zeros(0, np.uint32))
    nothing = np.zeros((0, 3), np.float32)
    wanted = [
        ChunkCopy("s", source, Box((), ()), scalar),
        ChunkCopy("e", empty, Box((0, 0), (0, 3)), nothing),
    ]
    found = read_copies(store, wanted, threads=2)
    assert scalar.tobytes() == FILE[16:24]
    assert (found.bytes_read, found.bytes_needed) == (8, 8)


def test_nothing_to_read():
    assert read_copies(MemoryStore(), [], threads=4).bytes_read == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"into": np.zeros(9, "u1")}, ValueError, "'t': a box of sizes [10] and items of 1 bytes"),
        ({"into": np.zeros(10, "u2")}, ValueError, "an array of shape [10] and items of 2"),
        (
            {"into": np.broadcast_to(np.uint8(0), (10,))},
            ValueError,
            "'t': its destination is read-only",
        ),
        (
            {"source": ChunkSource("f", 0, (1,), (10,), 1, (0, 9))},
            FormatError,
            "f, tensor 't': elements at bytes 0 to 10 are outside the payload",
        ),
        (
            {"source": ChunkSource("f", 0, (1,), (10,), 1, (0, 10), np.zeros(2, np.uint32))},
            FormatError,
            "f, tensor 't': 2 block checksums for a payload of 10 bytes",
        ),
    ],
)
def test_invalid_copies_are_refused_before_any_read(change, error, message):
    from dataclasses import replace

    store = Logging(f=FILE)
    with pytest.raises(error) as caught:
        read_copies(store, [flat(0, 5), replace(flat(0, 10), **change)], threads=1)
    assert message in str(caught.value)
    assert not store.reads


def test_other_work_stops_at_the_first_error(monkeypatch):
    monkeypatch.setattr("shardkeep.io.read.requests._PIECE", BLOCK)
    broken = bytearray(FILE)
    broken[0] ^= 1

    class Slow(Logging):
        def read_into(self, name, offset, buffer):
            time.sleep(0.01)
            return super().read_into(name, offset, buffer)

    store = Slow(f=broken)
    with pytest.raises(Damaged, match="block 0"):
        read_copies(store, [flat(0, 15 * BLOCK)], threads=2)
    assert len(store.reads) < 15
    assert not [t for t in threading.enumerate() if t.name.startswith("shardkeep-io")]


def test_errors_of_the_store_are_raised_unchanged():
    class Denied(MemoryStore):
        def read_into(self, name, offset, buffer):
            raise PermissionError(13, "Permission denied", name)

    with pytest.raises(PermissionError, match="'f'"):
        read_copies(Denied(), [flat(0, 10)], threads=1)


def test_buffers_stay_in_their_budget(tmp_path, monkeypatch):
    """A transposed payload that is larger than the buffers is read in parts."""
    import tracemalloc

    monkeypatch.setenv("SHARDKEEP_MAX_HOST_MEMORY_BYTES", str(2 << 20))
    rows, columns = 2048, 4096
    data = np.random.default_rng(1).integers(0, 2**32, (rows, columns), dtype=np.uint32)
    (tmp_path / "f").write_bytes(data.tobytes())
    crcs = block_checksums(data.tobytes())
    source = ChunkSource("f", 0, (4, 4 * columns), (columns, rows), 4, (0, data.nbytes), crcs)
    into = np.zeros((columns, rows), np.float32)
    tracemalloc.start()
    read_copies(
        LocalStore(tmp_path), [ChunkCopy("t", source, Box((0, 0), into.shape), into)], threads=2
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (into.view(np.uint32) == data.T).all()
    assert peak < 3 << 20


def test_progress_reaches_the_total():
    told = []
    store = Logging(f=FILE)
    memory = ChunkSource("f", 0, (1,), (50,), 1, (0, 50), None, memoryview(FILE[:50]))
    wanted = [flat(0, 9 * BLOCK), ChunkCopy("m", memory, Box((0,), (50,)), np.zeros(50, "u1"))]
    read_copies(store, wanted, threads=1, progress=lambda *what: told.append(what))
    assert told[-1] == ("read", 9 * BLOCK + 50, 9 * BLOCK + 50)
