"""One suite for every store: what `stores.contract.Store` promises."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardkeep.stores import LocalStore, MemoryStore, store_at
from shardkeep.stores.contract import Store
from shardkeep.stores.local.descriptors import Descriptor, opened

# The store is shared by the examples of a test, which leave it empty; the same test runs in several
# subclasses.
shared_fixture = settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)

BAD_NAMES = ["", ".", "/", "/etc/passwd", "..", "../x", "a/../../x", "a\0b", "a/", "a/.", "\ud800"]


class Boom(Exception):
    pass


def put(store: Store, name: str, data: bytes) -> None:
    with store.create(name) as sink:
        sink.write(data)


class StoreTests:
    """Subclass it and give a fixture `store`: a new and empty store for each test."""

    def test_is_a_store(self, store: Store) -> None:
        assert isinstance(store, Store)
        assert store.url

    def test_empty(self, store: Store) -> None:
        assert list(store.names()) == []
        for call in (
            lambda: store.size("a/b"),
            lambda: store.read("a/b", 0, 1),
            lambda: store.read_into("a/b", 0, memoryview(bytearray(1))),
        ):
            with pytest.raises(FileNotFoundError) as caught:
                call()
            assert str(caught.value.filename).endswith("a/b")

    @shared_fixture
    @given(
        parts=st.lists(st.binary(max_size=300), max_size=5),
        offset=st.integers(0, 1600),
        length=st.integers(0, 1600),
    )
    def test_round_trip(self, store: Store, parts: list[bytes], offset: int, length: int) -> None:
        whole = b"".join(parts)
        with store.create("folder/file") as sink:
            for part in parts:
                sink.write(part)
        try:
            expected = whole[offset : offset + length]
            assert store.size("folder/file") == len(whole)
            assert store.read("folder/file", offset, length) == expected
            buffer = bytearray(b"\xa5" * length)
            assert store.read_into("folder/file", offset, memoryview(buffer)) == len(expected)
            assert buffer == expected + b"\xa5" * (length - len(expected))
        finally:
            store.remove("folder/file")

    @shared_fixture
    @given(
        names=st.sets(
            st.lists(
                st.text(
                    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]),
                    min_size=1,
                    max_size=12,
                ).filter(lambda part: part not in (".", "..")),
                min_size=2,
                max_size=2,
            ).map("/".join),
            max_size=6,
        )
    )
    def test_names(self, store: Store, names: set[str]) -> None:
        for name in names:
            put(store, name, name.encode())
        try:
            assert sorted(store.names()) == sorted(names)
            assert all(store.read(name, 0, 100) == name.encode() for name in names)
        finally:
            for name in names:
                store.remove(name)
        assert list(store.names()) == []

    @pytest.mark.parametrize("name", ["a/**b", "a/*", "a/?", "a/[bc]"])
    def test_a_name_that_looks_like_a_pattern_is_a_name(self, store: Store, name: str) -> None:
        others = ["a/b", "a/c", "a/xb"]
        for one in (name, *others):
            put(store, one, b"1")
        store.remove(name)
        assert sorted(store.names()) == others

    def test_writes_any_buffer(self, store: Store) -> None:
        square = memoryview(bytes(range(16))).cast("B", (4, 4))
        with store.create("x") as sink:
            for data in (b"one", bytearray(b"two"), memoryview(b"-three-")[1:-1], b"", square):
                sink.write(data)
        assert store.read("x", 0, 99) == b"onetwothree" + bytes(range(16))
        store.publish("y", square)
        assert store.read("y", 0, 99) == bytes(range(16))

    def test_reads_into_any_shape(self, store: Store) -> None:
        put(store, "x", bytes(range(16)))
        target = bytearray(16)
        assert store.read_into("x", 0, memoryview(target).cast("H").cast("B", (2, 8))) == 16
        assert target == bytes(range(16))

    def test_large_length_takes_no_memory(self, store: Store) -> None:
        put(store, "x", b"abc")
        assert store.read("x", 1, 1 << 62) == b"bc"
        assert store.read("x", 1 << 62, 1 << 62) == b""

    @pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1)])
    def test_negative_range_is_refused(self, store: Store, offset: int, length: int) -> None:
        put(store, "x", b"abc")
        with pytest.raises(ValueError, match="bad range"):
            store.read("x", offset, length)

    @pytest.mark.parametrize("name", BAD_NAMES)
    def test_bad_names_are_refused(self, store: Store, name: str) -> None:
        for call in (
            lambda: store.size(name),
            lambda: store.read(name, 0, 1),
            lambda: store.read_into(name, 0, memoryview(bytearray(1))),
            lambda: store.create(name),
            lambda: store.publish(name, b""),
            lambda: store.remove(name),
        ):
            with pytest.raises(ValueError, match="bad file name") as caught:
                call()
            assert repr(name) in str(caught.value)

    def test_names_have_one_plain_form(self, store: Store) -> None:
        put(store, "a/./b/../c", b"1")
        assert list(store.names()) == ["a/c"]
        assert store.read("x/../a//c", 0, 9) == b"1"

    def test_create_refuses_what_exists(self, store: Store) -> None:
        put(store, "a/x", b"old")
        with pytest.raises(FileExistsError) as caught:
            store.create("a/x")
        assert str(caught.value.filename).endswith("a/x")
        assert store.read("a/x", 0, 9) == b"old"

    def test_exception_inside_the_sink_leaves_nothing(self, store: Store) -> None:
        with pytest.raises(Boom), store.create("a/x") as sink:
            sink.write(b"half")
            raise Boom
        assert list(store.names()) == []
        put(store, "a/x", b"again")
        assert store.read("a/x", 0, 9) == b"again"

    def test_publish_replaces(self, store: Store) -> None:
        for data in (b"first", b"2nd", b""):
            store.publish("deep/down/x", data)
            assert store.read("deep/down/x", 0, 99) == data
            assert store.size("deep/down/x") == len(data)
        assert list(store.names()) == ["deep/down/x"]

    def test_publish_is_atomic_for_readers(self, store: Store) -> None:
        contents = [b"a" * 70_000, b"b" * 50_000]
        store.publish("x", contents[0])
        seen, stop = set(), threading.Event()

        def look() -> None:
            while not stop.is_set():
                seen.add(store.read("x", 0, 100_000))

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(look) for _ in range(2)]
            try:
                turn, end = 0, time.monotonic() + 10
                while turn < 60 or (len(seen) < 2 and time.monotonic() < end):
                    turn += 1
                    store.publish("x", contents[turn % 2])
            finally:
                stop.set()
            for reader in readers:
                reader.result()
        assert seen == set(contents)

    def test_remove(self, store: Store) -> None:
        put(store, "x", b"1")
        assert store.read("x", 0, 1) == b"1"
        store.remove("x")
        store.remove("x")
        with pytest.raises(FileNotFoundError):
            store.read("x", 0, 1)
        put(store, "x", b"2")
        assert store.read("x", 0, 1) == b"2"

    def test_many_threads(self, store: Store) -> None:
        def work(number: int) -> None:
            data = bytes([number]) * (1000 + number)
            put(store, f"{number % 3}/{number}", data)
            buffer = bytearray(len(data))
            for _ in range(20):
                assert store.read_into(f"{number % 3}/{number}", 0, memoryview(buffer)) == len(data)
                assert buffer == data
            store.sync()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(48)))
        assert len(list(store.names())) == 48

    def test_one_creator_wins(self, store: Store) -> None:
        def work(number: int) -> bool:
            try:
                put(store, "same/name", bytes([number]))
            except FileExistsError:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(work, range(16))) == 1

    def test_sync(self, store: Store) -> None:
        store.sync()
        put(store, "a/b/c", b"1")
        store.sync()
        store.sync()
        assert store.read("a/b/c", 0, 2) == b"1"


class TestMemoryStore(StoreTests):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class TestLocalStore(StoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        # Fewer descriptors than files, so that they are dropped and opened again all the time.
        with LocalStore(tmp_path / "run" / "step", open_files=4) as store:
            yield store

    @pytest.fixture
    def synced(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Paths of what was synced, in order."""
        paths: list[str] = []
        real = os.fsync

        def fsync(fd: int) -> None:
            paths.append(path_of(fd))
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        return paths

    def test_sync_reaches_every_folder_that_gained_a_name(
        self, store: LocalStore, synced: list[str], tmp_path: Path
    ) -> None:
        put(store, "a/b/x", b"1")
        assert synced == [str(tmp_path / "run/step/a/b/x")]
        synced.clear()
        store.sync()
        folders = (".", "run", "run/step", "run/step/a", "run/step/a/b")
        assert sorted(synced) == [str(tmp_path / folder) for folder in folders]
        synced.clear()
        store.sync()
        assert synced == []
        put(store, "a/y", b"1")
        store.sync()
        assert synced == [str(tmp_path / "run/step/a/y"), str(tmp_path / "run/step/a")]

    def test_publish_syncs_the_file_before_and_the_folder_after_the_rename(
        self, store: LocalStore, synced: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        store.publish("x", b"1")  # and, once, what leads to the folder
        assert {str(folder) for folder in tmp_path.parents} <= set(synced)
        synced.clear()
        real = os.replace

        def replace(source: str, target: str) -> None:
            synced.append(f"replace {Path(target).name}")
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        store.publish("x", b"2")
        assert synced[0].endswith(".tmp")
        assert synced[1:] == ["replace x", str(tmp_path / "run/step")]

    def test_failed_folder_sync_is_not_forgotten(
        self, store: LocalStore, monkeypatch: pytest.MonkeyPatch, synced: list[str]
    ) -> None:
        put(store, "x", b"1")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail_with(errno.EIO))
            with pytest.raises(OSError, match="Input/output error") as caught:
                store.sync()
            assert caught.value.filename
        synced.clear()
        store.sync()
        assert synced

    def test_folder_that_cannot_be_synced_is_accepted(
        self, store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(store, "x", b"1")
        asked, refuse = [], fail_with(errno.EINVAL)
        monkeypatch.setattr(os, "fsync", lambda fd: asked.append(fd) or refuse(fd))
        store.sync()
        assert asked

    @pytest.mark.parametrize("call", ["write", "fsync", "replace"])
    def test_failed_publish_keeps_the_old_file(
        self, store: LocalStore, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        store.publish("x", b"old")
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail_with(errno.ENOSPC))
            with pytest.raises(OSError, match="No space left") as caught:
                store.publish("x", b"new")
            if call != "replace":
                assert "/run/step/x." in caught.value.filename
        assert list(store.names()) == ["x"]
        assert store.read("x", 0, 9) == b"old"

    def test_publishing_below_folders_that_can_not_be_synced_leaves_nothing(
        self, store: LocalStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        real = os.fsync

        def fsync(fd: int) -> None:
            if path_of(fd) == str(tmp_path):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(fd)

        put(store, "y", b"1")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(OSError, match="Input/output error") as caught:
                store.publish("x", b"new")
            assert caught.value.filename == str(tmp_path)
        assert list(store.names()) == ["y"]
        store.publish("x", b"new")
        assert store.read("x", 0, 9) == b"new"

    @pytest.mark.parametrize("call", ["write", "fsync", "close"])
    def test_failed_write_leaves_nothing(
        self, store: LocalStore, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        where, failed = Descriptor if call == "close" else os, []
        real = getattr(where, call)

        def once(of: Any, *rest: object) -> int:
            fd = of.fileno() if call == "close" else of
            if failed or not path_of(fd).endswith("/step/x"):
                return real(of, *rest)
            failed.append(call)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            patch.setattr(where, call, once)
            with pytest.raises(OSError, match="Input/output error"):
                put(store, "x", b"data")
        assert failed
        assert list(store.names()) == []

    def test_short_reads_and_writes_are_continued(
        self, store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write, pread, preadv = os.write, os.pread, os.preadv
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
        monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 5), at))
        monkeypatch.setattr(os, "preadv", lambda fd, to, at: preadv(fd, [to[0][:3]], at))
        data = os.urandom(100)
        put(store, "x", data)
        assert store.read("x", 3, 90) == data[3:93]
        buffer = bytearray(200)
        assert store.read_into("x", 1, memoryview(buffer)) == 99
        assert buffer[:99] == data[1:]

    def test_file_replaced_by_another_process_is_seen(self, tmp_path: Path) -> None:
        reader, writer = LocalStore(tmp_path), LocalStore(tmp_path)
        writer.publish("x", b"old")
        assert reader.read("x", 0, 9) == b"old"
        writer.publish("x", b"new")
        assert reader.read("x", 0, 9) == b"new"
        writer.remove("x")
        with pytest.raises(FileNotFoundError):
            reader.read("x", 0, 9)

    def test_a_replaced_file_is_not_read_where_another_link_keeps_it(self, tmp_path: Path) -> None:
        """As backups by `cp -al` or `rsync --link-dest` do."""
        reader, writer = LocalStore(tmp_path), LocalStore(tmp_path)
        writer.publish("x", b"old")
        assert writer.read("x", 0, 9) == reader.read("x", 0, 9) == b"old"
        os.link(tmp_path / "x", tmp_path / "backup")
        writer.publish("x", b"new")
        assert writer.read("x", 0, 9) == reader.read("x", 0, 9) == b"new"
        os.link(tmp_path / "x", tmp_path / "another")
        writer.remove("x")
        with pytest.raises(FileNotFoundError):
            reader.read("x", 0, 9)
        assert reader.read("backup", 0, 9) == b"old"

    def test_descriptors_are_bounded_and_closed(self, store: LocalStore) -> None:
        before = descriptors()
        for number in range(20):
            put(store, str(number), b"x")
            store.read(str(number), 0, 1)
        assert descriptors() == before + 4
        store.close()
        assert descriptors() == before
        assert store.read("1", 0, 1) == b"x"

    def test_fifo_is_refused_at_once(self, store: LocalStore) -> None:
        put(store, "x", b"")
        os.mkfifo(store.path / "pipe")
        for call in (lambda: store.read("pipe", 0, 1), lambda: store.size("pipe")):
            with pytest.raises(OSError, match=r"not a regular file.*pipe"):
                call()

    def test_unreadable_root_does_not_look_empty(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(NotADirectoryError):
            list(LocalStore(tmp_path / "file").names())

    def test_a_folder_below_is_used_as_the_store_was_told_to(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path, open_files=3, direct=False, budget=1 << 20)
        inner = store.below("a").below("b")
        assert isinstance(inner, LocalStore)
        put(inner, "x", b"1")
        with inner.reserve("y", 1 << 20) as target:
            assert not fcntl.fcntl(target._fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0)
        assert not inner._cold.works
        before = descriptors()
        for number in range(9):
            put(inner, str(number), b"1")
            inner.read(str(number), 0, 1)
        assert descriptors() == before + 3
        inner.close()
        reading = LocalStore(tmp_path, budget=1 << 20).below("a")
        assert reading._cold._budget == 1 << 20

    def test_relative_root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for root in ("", ".", "new"):
            store = LocalStore(root)
            put(store, "x", b"1")
            store.sync()
            store.publish("x", b"2")
            assert list(store.names()) in (["x"], ["new/x"])
            store.remove("x")


def test_a_file_that_nobody_closed_is_closed_without_a_word(tmp_path: Path) -> None:
    before = descriptors()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file = opened(str(tmp_path / "x"), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        assert os.write(file.fileno(), b"1") == 1
        assert descriptors() == before + 1
        del file
    assert caught == []
    assert descriptors() == before


def test_a_folder_is_no_file_and_does_not_stay_open(tmp_path: Path) -> None:
    before = descriptors()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"not a regular file.*folder"):
        LocalStore(tmp_path).read("folder", 0, 1)
    with pytest.raises(FileNotFoundError) as caught:
        opened(str(tmp_path / "none"), os.O_RDONLY)
    assert caught.value.filename == str(tmp_path / "none")
    assert descriptors() == before


def test_store_at(tmp_path: Path) -> None:
    assert isinstance(store_at(tmp_path), LocalStore)
    assert store_at(str(tmp_path)).url == str(tmp_path)
    memory = MemoryStore()
    assert store_at(memory) is memory
    with pytest.raises(ValueError, match="s3://bucket/run"):
        store_at("s3://bucket/run")
    with pytest.raises(TypeError, match="int"):
        store_at(3)  # type: ignore[arg-type]


def fail_with(number: int):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def path_of(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())
