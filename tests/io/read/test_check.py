"""Verification of whole payloads: all damage is found, and nothing else is reported."""

from __future__ import annotations

import errno
import threading
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkeep.io.checksums import block_checksums
from shardkeep.io.read.check import StoredPayload, verify_payloads
from shardkeep.settings import BLOCK, PAGE
from shardkeep.stores.local.store import LocalStore
from shardkeep.stores.memory import MemoryStore

sizes = st.one_of(
    st.integers(0, 300),
    st.sampled_from([BLOCK, BLOCK + 1, 4 * BLOCK, 4 * BLOCK + 1, 9 * BLOCK - 1]),
)


@st.composite
def layouts(draw):
    """Generate payloads with gaps between them, in two files."""
    files, payloads = {"f": b"", "g/h": b""}, []
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    for number, n in enumerate(draw(st.lists(sizes, min_size=1, max_size=6))):
        file = draw(st.sampled_from(sorted(files)))
        files[file] += rng.bytes(draw(st.integers(0, 99)))
        data = rng.bytes(n)
        kind = draw(st.sampled_from(["blocks", "crc", "both"]))
        payloads.append(
            StoredPayload(
                f"t{number}",
                file,
                len(files[file]),
                n,
                checksums=block_checksums(data) if kind != "crc" else None,
                crc=zlib.crc32(data) if kind != "blocks" else None,
            )
        )
        files[file] += data
    return files, payloads


def store_of(files):
    store = MemoryStore()
    for name, data in files.items():
        store.put(name, data, mode="replace")
    return store


@settings(max_examples=80)
@given(layouts(), st.integers(1, 3), st.data())
def test_only_payloads_with_flipped_bytes_are_reported(layout, threads, data):
    files, payloads = layout
    assert verify_payloads(store_of(files), payloads, threads=threads) == []
    broken = {name: bytearray(content) for name, content in files.items()}
    expected = set()
    for payload in payloads:
        if payload.nbytes and data.draw(st.booleans()):
            for at in data.draw(
                st.sets(st.integers(0, payload.nbytes - 1), min_size=1, max_size=3)
            ):
                broken[payload.file][payload.offset + at] ^= 0x10
                block = at // BLOCK if payload.checksums is not None else None
                expected.add((payload.file, payload.name, block))
    found = verify_payloads(store_of(broken), payloads, threads=threads)
    places = [(error.file, error.name, error.block) for error in found]
    assert set(places) == expected and len(places) == len(expected)
    order = [payload.name for payload in payloads]
    keys = [(order.index(name), block or 0) for _, name, block in places]
    assert keys == sorted(keys)
    assert all("its bytes have CRC-32" in str(error) for error in found)


@settings(max_examples=60)
@given(layouts(), st.integers(1, 3), st.data())
def test_every_payload_beyond_the_end_of_its_file_is_reported(layout, threads, data):
    files, payloads = layout
    cut = {
        name: content[: data.draw(st.integers(0, len(content)))] for name, content in files.items()
    }
    found = verify_payloads(store_of(cut), payloads, threads=threads)
    short = [p.name for p in payloads if p.offset + p.nbytes > len(cut[p.file])]
    assert [error.name for error in found] == short
    for error in found:
        payload = next(p for p in payloads if p.name == error.name)
        end = payload.offset + payload.nbytes
        what = f"the file ends at byte {len(cut[error.file])}, but its data go on to {end}"
        assert str(error) == f"{error.file}, {error.name!r}: {what}"


def test_damage_before_the_end_of_a_short_file_is_reported():
    data = bytearray(np.random.default_rng(0).bytes(4 * BLOCK))
    crcs = block_checksums(data)
    data[BLOCK + 5] ^= 1
    store = store_of({"f": bytes(data[: 3 * BLOCK + 9])})
    found = verify_payloads(store, [StoredPayload("t", "f", 0, 4 * BLOCK, crcs)], threads=1)
    assert [error.block for error in found] == [1, None]


def test_missing_files():
    payloads = [
        StoredPayload("a", "f", 0, 9, crc=1),
        StoredPayload("b", "g", 0, 0),
        StoredPayload("c", "f", 9, 9),
    ]
    found = verify_payloads(store_of({"g": b""}), payloads, threads=4)
    assert list(map(str, found)) == ["f, 'a': the file is missing", "f, 'c': the file is missing"]
    assert not [t for t in threading.enumerate() if t.name.startswith("shardkeep-io")]


def test_too_few_block_checksums_are_reported():
    store = store_of({"f": bytes(2 * BLOCK)})
    payload = StoredPayload("t", "f", 0, 2 * BLOCK, block_checksums(bytes(BLOCK)))
    (error,) = verify_payloads(store, [payload], threads=1)
    assert str(error) == f"f, 't': 1 block checksums for {2 * BLOCK} bytes"


def test_a_hostile_length_takes_no_memory():
    tracemalloc.start()
    (error,) = verify_payloads(
        store_of({"f": b"abc"}), [StoredPayload("t", "f", 1, 2**60, crc=5)], threads=2
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "the file ends at byte 3" in str(error)
    assert peak < 4 << 20


class Failing(MemoryStore):
    def __init__(self, error):
        super().__init__()
        self.error = error
        self.put("f", bytes(100), mode="replace")
        self.put("g", bytes(100), mode="replace")

    def read_into(self, name, offset, buffer):
        if name == "f":
            raise self.error
        return super().read_into(name, offset, buffer)


def test_media_errors_are_damage_and_others_are_not():
    payloads = [StoredPayload("t", "f", 0, 9, crc=1), StoredPayload("u", "g", 0, 9, crc=1)]
    store = Failing(OSError(errno.EIO, "Input/output error"))
    found = verify_payloads(store, payloads, threads=1)
    assert [(error.name, "Input/output error" in str(error)) for error in found] == [
        ("t", True),
        ("u", False),
    ]
    with pytest.raises(PermissionError):
        verify_payloads(Failing(PermissionError(13, "denied")), payloads, threads=2)


class BadSector(MemoryStore):
    """A store in which reads of one byte fail, after they have reported how far they came."""

    def __init__(self, data: bytes, at: int) -> None:
        super().__init__()
        self.put("f", data, mode="replace")
        self.at = at

    def read_steps(self, name, offset, buffer, step, *, keep=False):
        for low in range(0, len(buffer), step):
            part = buffer[low : low + step]
            if offset + low <= self.at < offset + low + len(part):
                raise OSError(errno.EIO, "Input/output error", name)
            yield low + super().read_into(name, offset + low, part)


@given(st.integers(0, 12 * BLOCK + 299), st.booleans())
@settings(max_examples=30)
def test_payloads_beside_a_bad_sector_are_not_reported(at, blocks):
    sizes = (100, 9 * BLOCK, 100, 3 * BLOCK, 100)  # one read for all payloads
    data, payloads = np.random.default_rng(0).bytes(sum(sizes)), []
    broken, first = bytearray(data), 0
    broken[500] ^= 1
    for number, nbytes in enumerate(sizes):
        part = data[first : first + nbytes]
        known = {"checksums": block_checksums(part)} if blocks else {"crc": zlib.crc32(part)}
        payloads.append(StoredPayload(f"t{number}", "f", first, nbytes, **known))
        first += nbytes
    found = verify_payloads(BadSector(bytes(broken), at), payloads, threads=1)
    (here,) = [p.name for p in payloads if p.offset <= at < p.offset + p.nbytes]
    unread = [error.name for error in found if "Input/output error" in str(error)]
    wrong = [(error.name, error.block) for error in found if "CRC-32" in str(error)]
    assert unread == [here]
    assert wrong in ([], [("t1", 0 if blocks else None)]) and (here == "t1" or wrong)


class Noting(LocalStore):
    """A store that records reads, and how many of them are not aligned for direct reads."""

    def __init__(self, path):
        super().__init__(path)
        self.reads, self.copied = [], 0

    def read_steps(self, name, offset, buffer, step, *, keep=False):
        address = np.frombuffer(buffer, dtype=np.uint8).ctypes.data
        self.reads.append(len(buffer))
        self.copied += (address - offset) % PAGE != 0
        return super().read_steps(name, offset, buffer, step, keep=keep)


def test_large_payloads_are_read_with_few_aligned_reads(tmp_path):
    data = np.random.default_rng(0).bytes(33 * BLOCK + 5)
    (tmp_path / "f").write_bytes(b"x" * 777 + data)
    store = Noting(tmp_path)
    payload = StoredPayload("t", "f", 777, len(data), checksums=block_checksums(data))
    assert verify_payloads(store, [payload], threads=2) == []
    assert sorted(store.reads) == [BLOCK + 5, 16 * BLOCK, 16 * BLOCK] and store.copied == 0


def test_memory_stays_bounded(tmp_path):
    (tmp_path / "f").write_bytes(bytes(24 << 20))
    payload = StoredPayload("t", "f", 0, 24 << 20, crc=zlib.crc32(bytes(24 << 20)))
    tracemalloc.start()
    assert verify_payloads(LocalStore(tmp_path), [payload], threads=2) == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


def test_progress_reaches_the_total():
    told = []
    store = store_of({"f": bytes(9 * BLOCK)})
    payload = StoredPayload("t", "f", 0, 9 * BLOCK, crc=0)
    verify_payloads(store, [payload], threads=2, progress=lambda *what: told.append(what))
    assert ("verify", 9 * BLOCK, 9 * BLOCK) in told
