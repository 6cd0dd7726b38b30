"""What is written lies where the columns say, with the checksums that they hold."""

from __future__ import annotations

import errno
import threading
import tracemalloc
import zlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkeep.io.write.items import Item, write_items
from shardkeep.settings import BLOCK
from shardkeep.stores.local.store import LocalStore
from shardkeep.stores.memory import MemoryStore
from support.store_files import names_in


class Frame:
    """A codec whose head depends on the position, and whose tail on the CRC."""

    def __init__(self, pad=7):
        self.pad = pad

    def head(self, position):
        return b"H" * (position % self.pad + 1)

    def tail(self, position, crc):
        return b"T" * (position % 3) + crc.to_bytes(4, "little")


class Bare:
    nbytes = 5

    def head(self, position):
        return b""

    def tail(self, position, crc):
        return b""


sizes = st.one_of(
    st.integers(0, 100),
    st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 4 * BLOCK + 9, 9 * BLOCK + 5]),
)


@settings(max_examples=40)
@given(st.lists(st.lists(sizes, max_size=6), min_size=1, max_size=4), st.integers(1, 4))
def test_items_lie_where_the_columns_say(layout, threads):
    store, rng, files = MemoryStore(), np.random.default_rng(0), {}
    for number, counts in enumerate(layout):
        files[f"f{number}"] = [(rng.bytes(n), Frame(n % 5 + 1)) for n in counts]
    written = write_items(
        store,
        {
            name: [Item(codec, memoryview(data)) for data, codec in items]
            for name, items in files.items()
        },
        threads=threads,
    )
    assert written.files == tuple(files)
    row = 0
    for number, (name, items) in enumerate(files.items()):
        whole = store.get_range(name, 0, store.head(name).size)
        position = 0
        for data, codec in items:
            head, tail = codec.head(position), codec.tail(position, zlib.crc32(data))
            item = head + data + tail
            assert whole[position : position + len(item)] == item
            assert written.file[row] == number
            assert written.item[row] == position
            assert written.length[row] == len(item)
            assert written.payload[row] == position + len(head)
            checksums = written.checksums[written.block[row] : written.block[row + 1]]
            blocks = [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]
            assert checksums.tolist() == [zlib.crc32(block) for block in blocks]
            assert written.crc[row] == zlib.crc32(data)
            position += len(item)
            row += 1
        assert position == len(whole)
    assert row == len(written.item) == len(written.block) - 1
    assert written.block[-1] == len(written.checksums)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
        np.array(3.5),
        np.zeros((0, 3), np.int64),
        np.zeros(3, dtype=[("real", "<f2"), ("imag", "<f2")]),
        np.broadcast_to(np.uint8(1), (1, 1)),
    ],
)
def test_arrays_of_any_dtype_and_shape(array):
    store = MemoryStore()
    write_items(store, {"f": [Item(Bare(), array), Item(Bare(), lambda: array)]}, threads=1)
    assert store.get_range("f", 0, 1 << 20) == array.tobytes() * 2


def test_payloads_are_made_when_their_turn_comes():
    alive, most = set(), []

    def make(number):
        def payload():
            alive.add(number)
            most.append(len(alive))
            array = np.full(2 * BLOCK, number, np.uint8)
            return array

        return payload

    class Last(Bare):
        def __init__(self, number):
            self.number = number

        def tail(self, position, crc):
            alive.discard(self.number)
            return b""

    store = MemoryStore()
    write_items(store, {"f": [Item(Last(n), make(n)) for n in range(9)]}, threads=2)
    assert most == [1] * 9


def test_strided_payloads_are_refused():
    with pytest.raises(ValueError, match="C-contiguous"):
        write_items(MemoryStore(), {"f": [Item(Bare(), np.zeros((4, 4))[:, :2])]}, threads=1)


class Counting(MemoryStore):
    def __init__(self, error=None):
        super().__init__()
        self.writes, self.error = [], error

    def open_writer(self, name):
        sink, write = super().open_writer(name), None
        write = sink.write

        def counted(data):
            self.writes.append(len(data))
            if self.error and name == "bad":
                raise self.error
            write(data)

        sink.write = counted
        return sink


def test_small_items_share_writes():
    store = Counting()
    items = [Item(Frame(), np.zeros(100, np.uint8)) for _ in range(30_000)]
    write_items(store, {"f": items}, threads=1)
    assert len(store.writes) <= sum(store.writes) / (1 << 20) + 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "'bad'"),
        (OSError("the network is gone"), "bad: the network is gone"),
    ],
)
def test_errors_name_the_file_and_leave_no_thread_and_no_such_file(error, message):
    before = threading.active_count()
    store = Counting(error)
    files = {name: [Item(Bare(), np.zeros(10, np.uint8))] for name in ["a", "bad", "c"]}
    with pytest.raises(OSError) as caught:
        write_items(store, files, threads=3)
    assert message in str(caught.value)
    assert type(caught.value) is type(error) and caught.value.errno == error.errno
    assert "bad" not in names_in(store)
    assert threading.active_count() == before


def test_existing_files_are_refused(tmp_path):
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(FileExistsError, match="/f"):
        write_items(LocalStore(tmp_path), {"f": [Item(Bare(), b"new")]}, threads=1)
    assert (tmp_path / "f").read_bytes() == b"old"


def test_nothing_to_write():
    written = write_items(MemoryStore(), {}, threads=4)
    assert (len(written.file), written.block.tolist(), written.files) == (0, [0], ())


def test_memory_is_the_buffers(tmp_path):
    payload = np.zeros(32 << 20, np.uint8)
    files = {f"f{n}": [Item(Frame(), payload), Item(Frame(), payload[:5000])] for n in range(2)}
    tracemalloc.start()
    write_items(LocalStore(tmp_path), files, threads=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
