"""Direct reads return the same bytes as others, whatever the kernel supports."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkeep.settings import PAGE
from shardkeep.stores import LocalStore
from shardkeep.stores.abilities import SupportsReadSteps
from shardkeep.stores.local import direct_reads, syscalls

pytestmark = pytest.mark.skipif(not direct_reads.FLAG, reason="this system has no direct reads")

DATA = os.urandom(3 * direct_reads.PIECE + 12_345)


@pytest.fixture
def store(tmp_path):
    (tmp_path / "f").write_bytes(DATA)
    with LocalStore(tmp_path) as store:
        yield store


@pytest.fixture
def cold(monkeypatch):
    """Simulate that nothing is in the page cache."""
    monkeypatch.setattr(syscalls, "cached", lambda fd, offset, length: 0)


@pytest.fixture
def calls(monkeypatch):
    """Return a list that collects (is direct, offset, requested bytes) of all reads."""
    made = []
    real = os.preadv

    def preadv(fd, buffers, offset):
        made.append((bool(flags_of(fd) & direct_reads.FLAG), offset, sum(map(len, buffers))))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return made


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def flags_of(fd):
    return fcntl.fcntl(fd, fcntl.F_GETFL)


@pytest.fixture(params=[False, True], ids=["copied", "in place"])
def in_place(request):
    """Return whether target and file range have the same position within a page."""
    return request.param


def memory(length, offset, in_place):
    """Return memory with the offset's position within a page, or one byte after it."""
    room = np.empty(length + 2 * PAGE, np.uint8)
    past = (offset + (not in_place) - room.ctypes.data) % PAGE
    return room[past : past + length]


def read(store, offset=0, length=None, *, in_place=False, **more):
    length = len(DATA) if length is None else length
    buffer = memory(length, offset, in_place).data
    step = more.pop("step", 1 << 20)
    done = 0
    for done in store.read_steps("f", offset, buffer, step, **more):
        assert bytes(buffer[:done]) == DATA[offset : offset + done], (
            "the bytes up to a reported number are read"
        )
    return bytes(buffer[:done])


def test_a_local_store_reads_in_steps(store):
    assert isinstance(store, SupportsReadSteps)


FOLDER = tempfile.TemporaryDirectory()
Path(FOLDER.name, "f").write_bytes(DATA)


@settings(max_examples=60)
@given(
    st.integers(0, len(DATA) + 5000),
    st.integers(0, len(DATA)),
    st.integers(1, direct_reads.PIECE),
    st.sampled_from([1 << 20, 3 << 20, 64 << 20]),
    st.booleans(),
)
def test_any_range_is_read(offset, length, step, budget, in_place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(syscalls, "cached", lambda fd, offset, length: 0)
        patch.setenv("SHARDKEEP_MAX_HOST_MEMORY_BYTES", str(budget))
        store = LocalStore(FOLDER.name)
        buffer = memory(length, offset, in_place).data
        steps = list(store.read_steps("f", offset, buffer, max(step, length // 50)))
        expected = DATA[offset : offset + length]
        assert (steps[-1] if steps else 0) == len(expected)
        assert steps == sorted(set(steps))
        assert buffer[: len(expected)] == expected
        assert store.read_into("f", offset, buffer) == len(expected)


def test_uncached_bytes_are_read_directly_in_few_reads(store, cold, calls, in_place):
    found = read(store, 77, 2 * direct_reads.PIECE, in_place=in_place)
    assert found == DATA[77 : 77 + 2 * direct_reads.PIECE]
    assert [past for past, _, _ in calls] == [True, True]
    assert all(offset % 4096 == length % 4096 == 0 for _, offset, length in calls)
    assert sum(length for _, _, length in calls) <= 2 * direct_reads.PIECE + 4 * 4096


def test_whole_pages_are_read_in_place(store, cold, monkeypatch):
    """Only the bytes on incomplete pages are copied."""
    real, lengths = os.preadv, []

    def preadv(fd, parts, at):
        for part in parts:
            address = np.frombuffer(part, np.uint8).ctypes.data
            assert address % PAGE == len(part) % PAGE == at % PAGE == 0
            if begin <= address < begin + len(into):
                lengths.append(len(part))
        return real(fd, parts, at)

    monkeypatch.setattr(os, "preadv", preadv)
    into = memory(2 * direct_reads.PIECE, 77, in_place=True)
    begin = into.ctypes.data
    assert store.read_into("f", 77, into.data) == len(into)
    assert into.tobytes() == DATA[77 : 77 + len(into)]
    assert sum(lengths) == len(into) - 2 * PAGE


def test_cached_bytes_are_read_through_the_cache(store, calls, monkeypatch):
    monkeypatch.setattr(syscalls, "cached", lambda fd, offset, length: length)
    assert read(store, step=len(DATA)) == DATA
    assert [past for past, _, _ in calls] == [False] * 4
    assert sum(length for _, _, length in calls) == len(DATA)


def test_short_reads_do_not_test_the_cache(store, monkeypatch):
    monkeypatch.setattr(syscalls, "cached", lambda *_: pytest.fail("asked"))
    assert read(store, 5, 60_000) == DATA[5:60_005]


def test_a_store_without_direct_io_reads_through_the_cache(store, cold, calls):
    assert read(LocalStore(store.path, direct=False)) == DATA
    assert not any(past for past, _, _ in calls)


def test_data_that_others_need_is_read_through_the_cache(store, cold, calls):
    assert read(store, keep=True) == DATA
    assert not any(past for past, _, _ in calls)


def test_the_kernel_reports_what_is_cached(store):
    fd = os.open(store.path / "f", os.O_RDONLY)
    try:
        os.fsync(fd)
        if syscalls.cached(fd, 0, len(DATA)) is None:
            pytest.skip("this kernel has no cachestat")
        store.get_range("f", 0, len(DATA))
        assert syscalls.cached(fd, 0, len(DATA)) >= len(DATA)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if syscalls.cached(fd, 0, len(DATA)):
            pytest.skip("this file system keeps its files in memory")
        assert read(store) == DATA
        left = syscalls.cached(fd, 0, len(DATA))
        assert left < 1 << 20, "only parts too small for a direct read were read through the cache"
        assert read(store, keep=True) == DATA
        assert syscalls.cached(fd, 0, len(DATA)) >= len(DATA)
    finally:
        os.close(fd)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EFAULT])
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_refusal_disables_direct_reads_without_an_error(
    store, cold, monkeypatch, call, code, in_place
):
    refused = []
    real = getattr(os, call)

    def refuse(first, second, *rest, **more):
        if (second if call == "open" else flags_of(first)) & direct_reads.FLAG:
            refused.append(call)
            raise OSError(code, os.strerror(code))
        return real(first, second, *rest, **more)

    monkeypatch.setattr(os, call, refuse)
    assert read(store, in_place=in_place) == DATA
    assert read(store, in_place=in_place) == DATA
    assert len(refused) == 1


def test_a_kernel_without_cachestat_is_called_once(store, calls, monkeypatch):
    asked = []
    monkeypatch.setattr(syscalls, "cached", lambda *where: asked.append(where))
    assert read(store) == read(store) == DATA
    assert len(asked) == 1
    assert not any(past for past, _, _ in calls)


def test_other_errors_of_direct_reads_are_raised(store, cold, monkeypatch, in_place):
    real = os.preadv

    def fail(fd, *rest):
        if flags_of(fd) & direct_reads.FLAG:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, *rest)

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        read(store, in_place=in_place)
    assert caught.value.filename == str(store.path / "f")
    monkeypatch.setattr(os, "preadv", real)
    assert read(store, in_place=in_place) == DATA


def test_short_direct_reads_are_continued(store, cold, monkeypatch, in_place):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: real(fd, [to[0][: 1 << 16]], at))
    assert read(store, in_place=in_place) == DATA


def test_reads_of_a_file_that_shrank_end_early(store, cold, in_place):
    assert read(store, 0, 1 << 20, in_place=in_place) == DATA[: 1 << 20]
    os.truncate(store.path / "f", direct_reads.PIECE + 1000)
    assert read(store, in_place=in_place) == DATA[: direct_reads.PIECE + 1000]
    os.truncate(store.path / "f", 0)
    assert read(store, in_place=in_place) == b""


def test_a_replaced_file_is_opened_again(store, cold):
    assert read(store, 0, 1 << 20) == DATA[: 1 << 20]
    store.put("f", bytes(1 << 20), mode="replace")
    buffer = bytearray(1 << 20)
    assert store.read_into("f", 0, memoryview(buffer)) == 1 << 20
    assert not any(buffer)


def test_files_in_shared_memory_are_read(cold):
    shared = Path("/dev/shm")
    if not shared.is_dir():
        pytest.skip("there is no /dev/shm")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        Path(folder, "f").write_bytes(DATA)
        assert read(LocalStore(folder)) == DATA


def test_buffers_are_limited_and_reused(store, cold, monkeypatch, in_place):
    made = []
    real = mmap.mmap
    monkeypatch.setattr(
        direct_reads.mmap,
        "mmap",
        lambda fd, length, **more: made.append((length, more)) or real(fd, length, **more),
    )
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: read(store, in_place=in_place), range(12))) == {DATA}
    assert 1 <= len(made) <= 4
    assert all(more["flags"] & mmap.MAP_PRIVATE for _, more in made), "a fork must not share them"
    store.close()
    made.clear()
    monkeypatch.setenv("SHARDKEEP_MAX_HOST_MEMORY_BYTES", str(4 << 20))
    with ThreadPoolExecutor(9) as pool:
        assert set(pool.map(lambda _: read(store, in_place=in_place), range(18))) == {DATA}
    assert sum(length for length, _ in made) <= (2 << 20) + 4 * 4096


def test_a_budget_of_zero_disables_direct_reads(store, cold, calls):
    with LocalStore(store.path, budget=0) as bare:
        assert read(bare) == DATA
    assert not any(direct for direct, *_ in calls)  # there is no buffer


def test_descriptors_of_direct_reads_count_toward_the_limit(tmp_path, cold):
    store = LocalStore(tmp_path, open_files=3)
    before = descriptors()
    for number in range(6):
        (tmp_path / str(number)).write_bytes(bytes(100_000))
        assert store.read_into(str(number), 0, memoryview(bytearray(100_000))) == 100_000
    assert descriptors() == before + 3
    store.delete("5")
    assert descriptors() <= before + 2
    store.close()
    assert descriptors() == before
