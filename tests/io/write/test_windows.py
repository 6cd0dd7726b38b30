"""A file that is written in windows equals one that is written from front to back."""

from __future__ import annotations

import ctypes
import threading
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkeep.format.torch_zip.container_write import TensorFraming
from shardkeep.io.arena import allocate_pages
from shardkeep.io.write.files import open_targets, write_windows
from shardkeep.io.write.staging import StagingLayout, stage_payloads
from shardkeep.io.write.windows import LIGHT_BYTES, lay_out_files
from shardkeep.io.write.written import collect_written
from shardkeep.settings import BLOCK, PAGE
from shardkeep.stores import LocalStore, MemoryStore
from shardkeep.types import DType

U8 = DType.named("uint8")
from support.store_files import names_in


class Bytes:
    """Payloads of random bytes, which count the bytes that are copied."""

    def __init__(self, sizes, seed=0):
        rng = np.random.default_rng(seed)
        self.data = [rng.bytes(n) for n in sizes]
        self.copied = np.zeros(len(sizes), dtype=np.int64)
        self.lock = threading.Lock()
        at = [np.frombuffer(data, np.uint8).ctypes.data for data in self.data]
        self.addresses = np.array(at, dtype=np.int64)

    def move(self, past):
        """Move each payload to an offset from a page; None removes its address."""
        for row, data in enumerate(self.data):
            memory = allocate_pages(len(data) + PAGE)[past[row] or 0 :][: len(data)]
            memory[:] = np.frombuffer(data, np.uint8)
            self.data[row] = memory
            self.addresses[row] = 0 if past[row] is None else memory.ctypes.data

    def copy(self, row, start, nbytes, address):
        part = bytes(self.data[row][start : start + nbytes])
        assert len(part) == nbytes > 0
        ctypes.memmove(address, part, nbytes)
        with self.lock:
            self.copied[row] += nbytes


def made(sizes, bare=(), files=1, window=4 * BLOCK, payloads=None, in_place=False, staged=0):
    """Return payloads and files, written in place if so asked, or staged by `staged` threads."""
    payloads = payloads or Bytes(sizes)
    keys = [None if row in bare else n for row, n in enumerate(sizes)]
    kinds = list(dict.fromkeys(keys))
    framings = [None if n is None else TensorFraming(U8, (n,)) for n in kinds]
    kind = np.array([kinds.index(n) for n in keys], np.int64)
    crcs = {row: zlib.crc32(payloads.data[row]) for row in bare}
    names = [f"f{number}" for number in range(files)]
    nbytes = np.array(sizes, np.int64)
    source, how = payloads, {"in_place": in_place}
    if staged:
        places = StagingLayout(payloads, nbytes)
        source = stage_payloads(payloads, places, allocate_pages(places.nbytes), threads=staged)
        payloads.copy = payloads.addresses = None  # must not be used any more
        how = {"in_place": True, "checksums": source.checksums}
    return payloads, lay_out_files(names, nbytes, kind, framings, source, crcs, window, **how)


def check(store, images, payloads, bare):
    """Check that all items and checksums are as the columns state."""
    written = collect_written(images)
    ends = dict.fromkeys(written.files, 0)
    for row, data in enumerate(map(bytes, payloads.data)):
        name = written.files[written.file[row]]
        start, length = int(written.item[row]), int(written.length[row])
        at, crc = int(written.payload[row]), zlib.crc32(data)
        item = store.get_range(name, start, length)
        blocks = [zlib.crc32(data[i : i + BLOCK]) for i in range(0, len(data), BLOCK)]
        mine = written.checksums[written.block[row] : written.block[row + 1]].tolist()
        if row in bare:
            assert item == data and mine == []
        else:
            frame = TensorFraming(U8, (len(data),))(start - at % PAGE, True)
            if len(frame.head) != at - start:
                frame = TensorFraming(U8, (len(data),))(start, False)
            assert item == frame.head + data + frame.tail(crc)
            assert mine == blocks
        assert written.crc[row] == crc
        ends[name] += length
    assert {name: store.head(name).size for name in written.files} == ends


sizes = st.lists(
    st.one_of(
        st.integers(0, 300),
        st.sampled_from([BLOCK - 1, BLOCK, 3 * BLOCK + 5, 8 * BLOCK, 11 * BLOCK + 1]),
    ),
    max_size=12,
)


@settings(max_examples=60)
@given(sizes, st.sets(st.integers(0, 11)), st.integers(1, 3), st.integers(1, 4), st.data())
def test_any_way_of_writing_makes_the_same_file(tmp_path_factory, nbytes, bare, files, threads, d):
    bare = {row for row in bare if row < len(nbytes)}
    way = d.draw(st.sampled_from(["direct", "buffered", "in order", "staged", "staged in order"]))
    payloads, images = made(nbytes, bare, files, staged=threads if "staged" in way else 0)
    store = MemoryStore()
    if "order" not in way:
        store = LocalStore(tmp_path_factory.mktemp("image"), direct=way != "buffered")
    with open_targets(store, images) as targets:
        write_windows(targets, images, threads=threads)
    check(store, images, payloads, bare)
    once = zip(payloads.copied.tolist(), nbytes, strict=True)
    assert all(copied == size or (not copied and size <= LIGHT_BYTES) for copied, size in once)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.integers(0, 300),
                st.sampled_from([BLOCK - 1, 2 * BLOCK - 1, 2 * BLOCK, 3 * BLOCK + 5]),
                st.sampled_from([8 * BLOCK, 8 * BLOCK - 64, 11 * BLOCK + 1, 12 * BLOCK + 4032]),
            ),
            st.one_of(st.none(), st.sampled_from([0, 16, 64, 512, 4032, PAGE - 1])),
        ),
        max_size=12,
    ),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from(["direct", "buffered", "in order", "copied", "staged"]),
)
def test_large_payloads_keep_their_alignment_and_are_written_in_place(
    tmp_path_factory, lying, files, threads, way
):
    sizes, past = [size for size, _ in lying], [at for _, at in lying]
    payloads = Bytes(sizes)
    payloads.move(past)
    in_place = way not in ("copied", "staged")
    staged = threads if way == "staged" else 0
    _, images = made(sizes, (), files, payloads=payloads, in_place=in_place, staged=staged)
    store = MemoryStore()
    if way != "in order":
        store = LocalStore(tmp_path_factory.mktemp("image"), direct=way != "buffered")
    with open_targets(store, images) as targets:
        write_windows(targets, images, threads=threads)
    check(store, images, payloads, ())
    places = collect_written(images).payload.tolist()
    for size, at, place, copied in zip(sizes, past, places, payloads.copied.tolist(), strict=True):
        known = size >= 2 * BLOCK and at is not None and at % 64 == 0
        if known:
            assert place % PAGE == at
        if known and in_place:
            assert copied < 2 * PAGE  # its ends, on pages that hold other bytes, too
        else:  # light payloads may be gathered in one call
            assert copied == size or (at is not None and not copied and size <= LIGHT_BYTES)


def test_a_staged_light_payload_at_the_start_of_a_window_has_a_checksum():
    """It is made alone. If nothing computed its checksum, its CRC-32 would be 0."""
    payloads, images = made([BLOCK - 1, BLOCK - 1, 1, BLOCK - 2, BLOCK - 2], staged=1)
    assert images[0].layout.payload[2] in images[0].layout.cuts
    store = MemoryStore()
    with open_targets(store, images) as targets:
        write_windows(targets, images, threads=1)
    check(store, images, payloads, ())


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(1, 1500)), min_size=1, max_size=5),
    st.sampled_from([1, 4, 8]),
    st.integers(0, 3),
    st.sampled_from([0, 2]),
    st.integers(1, 2),
)
def test_light_payloads_of_equal_size_are_made_together(runs, step, nowhere, staged, files):
    """Payloads have any addresses or none, and files are cut between them."""
    sizes = [size for size, count in runs for _ in range(count)]
    payloads = Bytes(sizes)
    past = [(row * step) % PAGE for row in range(len(sizes))]
    if nowhere:
        past = [None if row % nowhere == 0 else at for row, at in enumerate(past)]
    payloads.move(past)
    _, images = made(sizes, files=files, payloads=payloads, staged=staged)
    store = MemoryStore()
    with open_targets(store, images) as targets:
        write_windows(targets, images, threads=2)
    check(store, images, payloads, ())


def test_on_made_is_called_when_all_payloads_are_copied():
    payloads, images = made([3 * BLOCK, LIGHT_BYTES + 1, 9 * BLOCK])
    calls = []
    with open_targets(MemoryStore(), images) as targets:
        write_windows(
            targets, images, threads=2, on_made=lambda: calls.append(sum(payloads.copied))
        )
    assert calls == [12 * BLOCK + LIGHT_BYTES + 1]


def test_on_made_is_called_at_once_if_there_is_nothing_to_write():
    calls = []
    write_windows([], [], threads=2, on_made=lambda: calls.append(1))
    assert calls == [1]


def test_progress_counts_every_byte_of_the_files(tmp_path):
    _, images = made([5 * BLOCK, 10, 700])
    seen = []
    with open_targets(LocalStore(tmp_path), images) as targets:
        write_windows(targets, images, threads=1, progress=lambda *told: seen.append(told))
    total = images[0].layout.nbytes
    assert seen[-1] == ("write", total, total)
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})


class Broken(Bytes):
    def copy(self, row, start, nbytes, address):
        if start >= BLOCK * 4:
            time.sleep(0.05)  # by now the window with the tail waits for this one
            raise OSError(5, "it broke")
        super().copy(row, start, nbytes, address)


def test_a_failed_window_does_not_block_the_others(tmp_path):
    sizes = [16 * BLOCK]
    _, images = made(sizes, payloads=Broken(sizes))
    store = LocalStore(tmp_path)
    before = threading.active_count()
    with pytest.raises(OSError, match="it broke"), open_targets(store, images) as targets:
        write_windows(targets, images, threads=4)
    assert list(names_in(store)) == []
    assert threading.active_count() == before


@pytest.mark.parametrize("in_place", [False, True])
def test_system_calls_are_few(tmp_path, monkeypatch, in_place):
    """There is one aligned write per window. A file is reserved, truncated and synced once."""
    import os

    calls = []
    real = {name: getattr(os, name) for name in ("pwritev", "write", "ftruncate", "fsync")}

    def counted(name):
        def call(fd, *rest):
            calls.append((name, *rest))
            return real[name](fd, *rest)

        return call

    for name in real:
        monkeypatch.setattr(os, name, counted(name))
    sizes = [16 * BLOCK] * 3 + [64] * 5000
    payloads = Bytes(sizes)
    payloads.move([64] * len(sizes))
    _, images = made(sizes, window=8 * BLOCK, payloads=payloads, in_place=in_place)
    store = LocalStore(tmp_path, direct=True)
    with open_targets(store, images) as targets:
        write_windows(targets, images, threads=2)
    names = [call[0] for call in calls]
    mib = images[0].layout.nbytes / (1 << 20)
    assert names.count("pwritev") == images[0].count <= mib / 1.5
    assert names.count("ftruncate") == names.count("fsync") == 1
    assert names.count("write") == 0
    for _, parts, offset in (call for call in calls if call[0] == "pwritev"):
        assert offset % PAGE == 0
        for part in parts:
            assert len(part) % PAGE == 0
            assert np.frombuffer(part, np.uint8).ctypes.data % PAGE == 0


def test_files_have_equal_sizes_including_frames():
    """The frames of small payloads have more bytes than the payloads."""
    _, images = made([64] * 1000 + [500_000], files=2)
    lengths = [image.layout.nbytes for image in images]
    assert max(lengths) - min(lengths) < 40_000, lengths
    assert all(len(image.rows) for image in images)
