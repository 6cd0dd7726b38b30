"""Positioned writers: direct writes where they work; a file is complete or removed."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shardkeep.io.arena import allocate_pages
from shardkeep.settings import PAGE
from shardkeep.stores import LocalStore
from shardkeep.stores.local import files as module
from shardkeep.stores.local import syscalls
from shardkeep.stores.local.descriptors import Descriptor

TMPFS = Path("/dev/shm")
from support.store_files import names_in


def test_sync_waits_for_a_concurrent_sync(tmp_path, monkeypatch):
    store = LocalStore(tmp_path)
    with store.open_writer("x"):
        pass
    begun, goes, done = threading.Event(), threading.Event(), threading.Event()
    real = os.fsync

    def slow(fd):
        begun.set()
        assert goes.wait(30)
        real(fd)

    monkeypatch.setattr(os, "fsync", slow)
    first = threading.Thread(target=store.sync)
    first.start()
    assert begun.wait(30)
    second = threading.Thread(target=lambda: (store.sync(), done.set()))
    second.start()
    assert not done.wait(0.3)  # the folder is not synced yet
    goes.set()
    first.join()
    second.join()
    assert done.is_set()


def page(*values: int) -> np.ndarray:
    made = allocate_pages(PAGE * len(values))
    for at, value in enumerate(values):
        made[at * PAGE : (at + 1) * PAGE] = value
    return made


def is_direct(target: module.LocalPositionedWriter) -> bool:
    return bool(fcntl.fcntl(target._fd, fcntl.F_GETFL) & os.O_DIRECT)


def content(store: LocalStore, name: str) -> bytes:
    return store.get_range(name, 0, 1 << 20)


def test_parts_are_written_in_any_order_and_the_last_is_cut(tmp_path):
    store = LocalStore(tmp_path)
    with store.open_positioned_writer("a/x", 2 * PAGE + 10) as target:
        target.write_at(2 * PAGE, [page(3).data])
        target.write_at(0, [page(1, 2).data])
    assert content(store, "a/x") == bytes([1]) * PAGE + bytes([2]) * PAGE + bytes([3]) * 10


def test_an_existing_file_is_refused(tmp_path):
    store = LocalStore(tmp_path)
    with store.open_positioned_writer("x", 0):
        pass
    assert store.head("x").size == 0
    with pytest.raises(FileExistsError) as caught:
        store.open_positioned_writer("x", 5)
    assert caught.value.filename == str(tmp_path / "x")


@pytest.mark.skipif(not TMPFS.is_dir(), reason="no tmpfs")
def test_a_full_disk_is_reported_before_anything_is_written():
    # On tmpfs, because ext4 briefly takes all free space before it refuses.
    folder = TMPFS / f"shardkeep-full-{os.getpid()}"
    store, room = LocalStore(folder), os.statvfs(TMPFS)
    try:
        with pytest.raises(OSError, match="No space left") as caught:
            store.open_positioned_writer("x", 2 * room.f_blocks * room.f_frsize)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(folder / "x")
        assert list(names_in(store)) == []
    finally:
        folder.rmdir()


@pytest.mark.skipif(not TMPFS.is_dir(), reason="no tmpfs")
def test_writes_are_buffered_where_direct_writes_are_refused():
    folder = TMPFS / f"shardkeep-{os.getpid()}"
    store = LocalStore(folder)
    try:
        with store.open_positioned_writer("x", PAGE) as target:
            target.write_at(0, [page(7).data])
        assert content(store, "x") == bytes([7]) * PAGE
    finally:
        for name in names_in(store):
            store.delete(name)
        folder.rmdir()


def test_a_refused_flag_disables_direct_writes_of_the_store(tmp_path, monkeypatch):
    real, asked = fcntl.fcntl, []

    def refuse(fd, command, *rest):
        if command == fcntl.F_SETFL and rest[0] & os.O_DIRECT:
            asked.append(fd)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, command, *rest)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    store = LocalStore(tmp_path)
    for name in "xy":
        with store.open_positioned_writer(name, PAGE) as target:
            target.write_at(0, [page(4).data])
        assert content(store, name) == bytes([4]) * PAGE
    assert len(asked) == 1


def test_a_refused_first_write_disables_direct_writes_of_the_store(tmp_path, monkeypatch):
    """Some FUSE file systems accept the flag, and fail at the first write."""
    real, refused = os.pwritev, []

    def pwritev(fd, parts, offset):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, parts, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    store = LocalStore(tmp_path)
    for name in "xy":
        with store.open_positioned_writer(name, PAGE + 3) as target:
            target.write_at(0, [page(4, 5).data])
        assert content(store, name) == bytes([4]) * PAGE + bytes([5]) * 3
    assert refused == [0]


def test_threads_whose_direct_writes_are_refused_together_continue(tmp_path, monkeypatch):
    real, both = os.pwritev, threading.Barrier(2)

    def pwritev(fd, parts, offset):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            both.wait(30)  # both calls are in progress before either is refused
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, parts, offset)

    store = LocalStore(tmp_path)
    target = store.open_positioned_writer("x", 2 * PAGE)
    if not is_direct(target):
        pytest.skip("this file system has no direct I/O")
    monkeypatch.setattr(os, "pwritev", pwritev)
    with target, ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda at: target.write_at(at * PAGE, [page(4 + at).data]), range(2)))
    assert content(store, "x") == bytes([4]) * PAGE + bytes([5]) * PAGE


def test_an_invalid_buffered_write_raises(tmp_path, monkeypatch):
    def refuse(fd, parts, offset):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "pwritev", refuse)
    store = LocalStore(tmp_path, direct=False)
    with pytest.raises(OSError, match="Invalid argument") as caught:  # noqa: SIM117
        with store.open_positioned_writer("x", PAGE) as target:
            target.write_at(0, [page(4).data])
    assert caught.value.filename == str(tmp_path / "x")
    assert list(names_in(store)) == []


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real, calls = os.pwrite, []

    def pwritev(fd, parts, at):
        calls.append(len(parts))
        return real(fd, b"".join(parts)[:most], at)

    monkeypatch.setattr(os, "pwritev", pwritev)
    store = LocalStore(tmp_path, direct=False)
    for most in (1000, PAGE, PAGE + 1, 2 * PAGE + 7):
        with store.open_positioned_writer(str(most), 4 * PAGE) as target:
            target.write_at(0, [page(8, 9).data, page(6).data, page(7).data])
        made = b"".join(bytes([value]) * PAGE for value in (8, 9, 6, 7))
        assert content(store, str(most)) == made
    assert calls[-2:] == [3, 2]  # written parts are not passed again


def test_memory_that_direct_writes_refuse_is_written_through_the_cache(tmp_path, monkeypatch):
    """Device memory may be readable although the kernel cannot pin it."""
    real = os.pwritev

    def pwritev(fd, parts, at):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        return real(fd, parts, at)

    monkeypatch.setattr(os, "pwritev", pwritev)
    store = LocalStore(tmp_path)
    with store.open_positioned_writer("x", PAGE) as target:
        target.write_at(0, [page(5).data])
    assert content(store, "x") == bytes([5]) * PAGE


def test_more_parts_than_one_call_takes_are_written(tmp_path):
    store, pages = LocalStore(tmp_path), page(*range(200))
    parts = [pages[at * PAGE : (at + 1) * PAGE].data for at in range(200)] * 12
    with store.open_positioned_writer("x", 2400 * PAGE - 5) as target:
        target.write_at(0, parts)
    assert store.get_range("x", 0, 2400 * PAGE) == (pages.tobytes() * 12)[:-5]


def test_a_direct_write_that_stops_inside_a_page_continues_buffered(tmp_path, monkeypatch):
    real, seen = os.pwritev, []

    def pwritev(fd, parts, at):
        direct = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        seen.append(bool(direct))
        if direct:  # as if a signal or a limit of the file system cut it short
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            done = real(fd, [parts[0][:700]], at)
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
            return done
        return real(fd, parts, at)

    store = LocalStore(tmp_path)
    target = store.open_positioned_writer("x", 2 * PAGE)
    if not is_direct(target):
        pytest.skip("this file system has no direct I/O")
    monkeypatch.setattr(os, "pwritev", pwritev)
    with target:
        target.write_at(0, [page(8, 9).data])
    assert content(store, "x") == bytes([8]) * PAGE + bytes([9]) * PAGE
    assert seen == [True, False]


@pytest.mark.parametrize("call", ["pwritev", "ftruncate", "fsync", "close"])
def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch, call):
    store, where, failed = LocalStore(tmp_path), Descriptor if call == "close" else os, []
    real = getattr(where, call)

    def once(of, *rest):
        fd = of.fileno() if call == "close" else of
        if failed or Path(f"/proc/self/fd/{fd}").readlink().name != "x":
            return real(of, *rest)
        failed.append(call)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(where, call, once)
    with pytest.raises(OSError, match="Input/output error") as caught:  # noqa: SIM117
        with store.open_positioned_writer("x", PAGE) as target:
            target.write_at(0, [page(1).data])
    assert caught.value.filename == str(tmp_path / "x")
    assert failed == [call]
    assert list(names_in(store)) == []


def test_files_grow_where_space_cannot_be_reserved(tmp_path, monkeypatch):
    def refuse(*_):
        syscalls.ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(syscalls, "_fallocate", refuse)
    store = LocalStore(tmp_path)
    with store.open_positioned_writer("x", PAGE) as target:
        target.write_at(0, [page(6).data])
    assert content(store, "x") == bytes([6]) * PAGE
