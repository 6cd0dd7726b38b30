"""Appended items are stored at the offsets and with the checksums that the columns state."""

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

from shardkeep.format.torch_zip.container_write import TensorFraming
from shardkeep.io.memory_payloads import BytesPayloads
from shardkeep.io.pool import parallel
from shardkeep.io.write.append import append_file
from shardkeep.io.write.files import write_plain_file
from shardkeep.settings import ALIGNMENT, BLOCK
from shardkeep.stores.local.store import LocalStore
from shardkeep.stores.memory import MemoryStore
from shardkeep.types import DType
from support.store_files import names_in

U8 = DType.named("uint8")

sizes = st.one_of(
    st.integers(0, 100),
    st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 4 * BLOCK + 9, 9 * BLOCK + 5]),
)


def blocks_of(data):
    return [zlib.crc32(data[i : i + BLOCK]) for i in range(0, len(data), BLOCK)]


def checksums_of(written, row):
    return written.checksums[written.block[row] : written.block[row + 1]].tolist()


def append(store, name, items):
    with append_file(store, name) as file:
        for framing, data in items:
            file.append(framing, memoryview(data))
    return file.written()


def tensor(data):
    return (TensorFraming(U8, (len(data),)), data)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(sizes, st.booleans(), st.integers(1, 40)), max_size=8), st.integers(0, 70)
)
def test_items_are_stored_where_the_columns_say(runs, past):
    rng, store = np.random.default_rng(0), MemoryStore()
    counts = [(n, framed) for n, framed, more in runs for _ in range(more if n < 200 else 1)]
    items = []
    for n, framed in counts:
        memory = np.frombuffer(rng.bytes(n + past), np.uint8)[past:].data
        items.append(tensor(memory) if framed else (None, memory))
    written = append(store, "f", items)
    assert written.files == ("f",)
    assert len(written.item) == len(items) == len(written.block) - 1
    assert written.block[-1] == len(written.checksums)
    for row, (framing, data) in enumerate(items):
        start, at = int(written.item[row]), int(written.payload[row])
        item = store.get_range("f", start, int(written.length[row]))
        payload = bytes(data)
        if framing is None:
            assert (item, at) == (payload, start)
        else:
            assert at % ALIGNMENT == 0
            head = at - start
            assert item[head : head + len(payload)] == payload
            frames = [framing(start - at % 4096, True), framing(start, False)]
            assert item in [f.head + payload + f.tail(zlib.crc32(payload)) for f in frames]
        assert checksums_of(written, row) == blocks_of(payload)
        assert written.crc[row] == zlib.crc32(payload)
    order = np.argsort(written.item, kind="stable")
    ends = (written.item + written.length)[order]
    assert (written.item[order][1:] == ends[:-1]).all()
    assert store.head("f").size == (int(ends[-1]) if len(ends) else 0)


def test_a_payload_may_change_once_it_is_appended():
    """Planners may use the same memory for each item."""
    store, memory = MemoryStore(), np.zeros(2 * BLOCK, np.uint8)
    sizes = [10, 2 * BLOCK, BLOCK - 1, 100, BLOCK]
    with append_file(store, "f") as file:
        for number, size in enumerate(sizes, 1):
            memory[:] = number
            file.append(TensorFraming(U8, (size,)), memory[:size].data)
    written = file.written()
    for row, size in enumerate(sizes):
        payload = store.get_range("f", int(written.payload[row]), size)
        assert payload == bytes([row + 1]) * size


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
def test_bytes_of_any_array_are_appended(array):
    store = MemoryStore()
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    append(store, "f", [(None, raw), (None, raw)])
    assert store.get_range("f", 0, 1 << 20) == array.tobytes() * 2


def test_strided_bytes_are_refused():
    strided = np.zeros((1024, 1024), np.uint8)[:, :512].data
    with pytest.raises(ValueError, match="contiguous"):
        append(MemoryStore(), "f", [(None, strided)])


class Counting(MemoryStore):
    def __init__(self, error=None):
        super().__init__()
        self.writes, self.error = [], error

    def open_writer(self, name):
        writer, write = super().open_writer(name), None
        write = writer.write

        def counted(data):
            self.writes.append(len(data))
            if self.error and name == "bad":
                raise self.error
            write(data)

        writer.write = counted
        return writer


def test_small_items_share_writes():
    store = Counting()
    append(store, "f", [tensor(bytes(100))] * 30_000)
    assert len(store.writes) <= sum(store.writes) / (1 << 20) + 1


ERRORS = [
    (OSError(errno.ENOSPC, "No space left on device"), "'bad'"),
    (OSError("the network is gone"), "bad: the network is gone"),
]


@pytest.mark.parametrize(("error", "message"), ERRORS)
@pytest.mark.parametrize("plain", [False, True])
def test_a_write_error_names_the_file_and_leaves_no_thread_and_no_file(error, message, plain):
    before = threading.active_count()
    store = Counting(type(error)(*error.args))
    payloads = BytesPayloads([bytes(10)])

    def write(names):
        for name in names:
            if plain:
                write_plain_file(
                    store,
                    name,
                    np.arange(1),
                    payloads.nbytes,
                    payloads,
                    max_window_bytes=1 << 20,
                    checksums=True,
                )
            else:
                append(store, name, [(None, bytes(10))])

    with pytest.raises(OSError) as caught:
        parallel(["a", "bad", "c"], write, 3)
    assert message in str(caught.value)
    assert type(caught.value) is type(error) and caught.value.errno == error.errno
    assert "bad" not in names_in(store)
    assert threading.active_count() == before


def test_existing_files_are_refused(tmp_path):
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(FileExistsError, match="/f"):
        append(LocalStore(tmp_path), "f", [(None, b"new")])
    assert (tmp_path / "f").read_bytes() == b"old"


def test_a_file_without_items_is_empty():
    store = MemoryStore()
    written = append(store, "f", [])
    assert (len(written.file), written.block.tolist(), written.files) == (0, [0], ("f",))
    assert store.head("f").size == 0


def test_appending_takes_memory_for_buffers_only(tmp_path):
    payload = np.zeros(32 << 20, np.uint8)
    store = LocalStore(tmp_path)
    tracemalloc.start()
    for n in range(2):
        append(store, f"f{n}", [tensor(payload.data), tensor(payload.data[:5000])])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


@settings(max_examples=60)
@given(
    st.lists(sizes, max_size=8),
    st.integers(0, 70),
    st.sampled_from(["memory", "direct", "buffered"]),
    st.integers(4, 9),
)
def test_plain_files_are_their_payloads_in_order_without_gaps(
    tmp_path_factory, counts, past, kind, blocks
):
    rng = np.random.default_rng(1)
    data = [np.frombuffer(rng.bytes(n + past), np.uint8)[past:].data for n in counts]
    store = MemoryStore()
    if kind != "memory":
        store = LocalStore(tmp_path_factory.mktemp("plain"), direct=kind == "direct")
    payloads, rows = BytesPayloads(data), np.arange(len(data))[::-1]
    nbytes = payloads.nbytes[rows]
    how = {"max_window_bytes": blocks * BLOCK}
    checked = write_plain_file(store, "f", rows, nbytes, payloads, checksums=True, **how)
    write_plain_file(store, "g", rows, nbytes, payloads, checksums=False, **how)
    whole = b"".join(bytes(data[row]) for row in rows)
    for name in "fg":
        assert store.head(name).size == len(whole)
        assert store.get_range(name, 0, len(whole)) == whole
    for at, row in enumerate(rows):
        payload = bytes(data[row])
        assert checksums_of(checked, at) == blocks_of(payload)
        assert checked.crc[at] == zlib.crc32(payload)
        start = int(checked.layout.payload[at])
        assert whole[start : start + len(payload)] == payload
