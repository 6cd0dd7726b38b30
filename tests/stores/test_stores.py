"""The memory and local stores: the public test suite, and tests of the local store alone."""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardkeep.stores import LocalStore, MemoryStore, open_store
from shardkeep.stores.contract import Store
from shardkeep.stores.folders import list_folders, subfolder
from shardkeep.stores.local.descriptors import Descriptor, opened
from shardkeep.testing import FaultyStore, StoreTests
from support.store_files import names_in

# All examples of a test share one store and leave it empty, and subclasses inherit the tests.
shared_fixture = settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)


def put(store: Store, name: str, data: bytes) -> None:
    with store.open_writer(name) as sink:
        sink.write(data)


class StoreProperties(StoreTests):
    """The public test suite, and two properties tested with hypothesis."""

    @shared_fixture
    @given(
        parts=st.lists(st.binary(max_size=300), max_size=5),
        offset=st.integers(0, 1600),
        length=st.integers(0, 1600),
    )
    def test_round_trip(self, store: Store, parts: list[bytes], offset: int, length: int) -> None:
        whole = b"".join(parts)
        with store.open_writer("folder/file") as sink:
            for part in parts:
                sink.write(part)
        try:
            expected = whole[offset : offset + length]
            assert store.head("folder/file").size == len(whole)
            assert store.get_range("folder/file", offset, length) == expected
            buffer = bytearray(b"\xa5" * length)
            assert store.read_into("folder/file", offset, memoryview(buffer)) == len(expected)
            assert buffer == expected + b"\xa5" * (length - len(expected))
        finally:
            store.delete("folder/file")

    @shared_fixture
    @given(
        names=st.sets(
            st.lists(
                st.text(
                    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]),
                    min_size=1,
                    max_size=12,
                ).filter(lambda part: part not in (".", "..") and "::" not in part),
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
            assert sorted(names_in(store)) == sorted(names)
            assert all(store.get_range(name, 0, 100) == name.encode() for name in names)
        finally:
            for name in names:
                store.delete(name)
        assert list(names_in(store)) == []


@pytest.mark.parametrize("kind", [LocalStore, MemoryStore])
def test_a_name_can_contain_two_colons(tmp_path: Path, kind: Any) -> None:
    """The property above excludes "::", which fsspec interprets as a chain of URLs."""
    store = kind(str(tmp_path))
    put(store, "a/::", b"1")
    assert names_in(store) == ["a/::"]


class TestMemoryStore(StoreProperties):
    def make_store(self, folder: Path) -> Store:
        return MemoryStore()


class TestPrefixStore(StoreProperties):
    """A folder of a store that has no folders of its own."""

    def make_store(self, folder: Path) -> Store:
        inner = MemoryStore(files={"x": b"above", "run/step_10/x": b"beside"})
        return subfolder(inner, "run/step_1")


class TestFaultyStore(StoreProperties):
    """A faulty store that is set not to fail."""

    def make_store(self, folder: Path) -> Store:
        return FaultyStore(MemoryStore())


class TestLocalStore(StoreProperties):
    def make_store(self, folder: Path) -> Store:
        # Fewer descriptors than files, so that files are often closed and opened again.
        return LocalStore(folder / "run" / "step", open_files=4)

    @pytest.fixture
    def synced(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Return a list that collects the paths that are synced, in order."""
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
        store.put("x", b"1", mode="replace")  # this also syncs the folder's parents, once
        assert {str(folder) for folder in tmp_path.parents} <= set(synced)
        synced.clear()
        real = os.replace

        def replace(source: str, target: str) -> None:
            synced.append(f"replace {Path(target).name}")
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        store.put("x", b"2", mode="replace")
        assert synced[0].endswith(".tmp")
        assert synced[1:] == ["replace x", str(tmp_path / "run/step")]

    def test_a_failed_folder_sync_is_repeated(
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
        store.put("x", b"old", mode="replace")
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail_with(errno.ENOSPC))
            with pytest.raises(OSError, match="No space left") as caught:
                store.put("x", b"new", mode="replace")
            if call != "replace":
                assert "/run/step/x." in caught.value.filename
        assert list(names_in(store)) == ["x"]
        assert store.get_range("x", 0, 9) == b"old"

    def test_publishing_below_folders_that_cannot_be_synced_leaves_no_file(
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
                store.put("x", b"new", mode="replace")
            assert caught.value.filename == str(tmp_path)
        assert list(names_in(store)) == ["y"]
        store.put("x", b"new", mode="replace")
        assert store.get_range("x", 0, 9) == b"new"

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
        assert list(names_in(store)) == []

    def test_short_reads_and_writes_are_continued(
        self, store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write, pread, preadv = os.write, os.pread, os.preadv
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
        monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 5), at))
        monkeypatch.setattr(os, "preadv", lambda fd, to, at: preadv(fd, [to[0][:3]], at))
        data = os.urandom(100)
        put(store, "x", data)
        assert store.get_range("x", 3, 90) == data[3:93]
        buffer = bytearray(200)
        assert store.read_into("x", 1, memoryview(buffer)) == 99
        assert buffer[:99] == data[1:]

    def test_file_replaced_by_another_process_is_seen(self, tmp_path: Path) -> None:
        reader, writer = LocalStore(tmp_path), LocalStore(tmp_path)
        writer.put("x", b"old", mode="replace")
        assert reader.get_range("x", 0, 9) == b"old"
        writer.put("x", b"new", mode="replace")
        assert reader.get_range("x", 0, 9) == b"new"
        writer.delete("x")
        with pytest.raises(FileNotFoundError):
            reader.get_range("x", 0, 9)

    def test_a_replaced_file_is_not_read_where_another_link_keeps_it(self, tmp_path: Path) -> None:
        """Backups by `cp -al` or `rsync --link-dest` make such links."""
        reader, writer = LocalStore(tmp_path), LocalStore(tmp_path)
        writer.put("x", b"old", mode="replace")
        assert writer.get_range("x", 0, 9) == reader.get_range("x", 0, 9) == b"old"
        os.link(tmp_path / "x", tmp_path / "backup")
        writer.put("x", b"new", mode="replace")
        assert writer.get_range("x", 0, 9) == reader.get_range("x", 0, 9) == b"new"
        os.link(tmp_path / "x", tmp_path / "another")
        writer.delete("x")
        with pytest.raises(FileNotFoundError):
            reader.get_range("x", 0, 9)
        assert reader.get_range("backup", 0, 9) == b"old"

    def test_descriptors_are_bounded_and_closed(self, store: LocalStore) -> None:
        before = descriptors()
        for number in range(20):
            put(store, str(number), b"x")
            store.get_range(str(number), 0, 1)
        assert descriptors() == before + 4
        store.close()
        assert descriptors() == before
        assert store.get_range("1", 0, 1) == b"x"

    def test_fifo_is_refused_at_once(self, store: LocalStore) -> None:
        put(store, "x", b"")
        os.mkfifo(store.path / "pipe")
        for call in (lambda: store.get_range("pipe", 0, 1), lambda: store.head("pipe").size):
            with pytest.raises(OSError, match=r"not a regular file.*pipe"):
                call()

    def test_unreadable_root_does_not_look_empty(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(NotADirectoryError):
            list(names_in(LocalStore(tmp_path / "file")))

    def test_a_subfolder_inherits_the_options_of_its_store(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path, open_files=3, direct=False, budget=1 << 20)
        inner = store.subfolder("a").subfolder("b")
        assert isinstance(inner, LocalStore)
        put(inner, "x", b"1")
        with inner.open_positioned_writer("y", 1 << 20) as target:
            assert not fcntl.fcntl(target._fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0)
        assert not inner._cold.works
        before = descriptors()
        for number in range(9):
            put(inner, str(number), b"1")
            inner.get_range(str(number), 0, 1)
        assert descriptors() == before + 3
        inner.close()
        reading = LocalStore(tmp_path, budget=1 << 20).subfolder("a")
        assert reading._cold._budget == 1 << 20

    def test_a_listing_does_not_scan_subfolders(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(50):
            (tmp_path / f"other/{number}").mkdir(parents=True)
            (tmp_path / f"other/{number}/file").write_bytes(b"1")
        put(LocalStore(tmp_path), "x", b"1")
        scanned, scandir = [], os.scandir
        monkeypatch.setattr(os, "scandir", lambda path: scanned.append(path) or scandir(path))
        found = LocalStore(tmp_path).list()
        assert (found.files, found.prefixes) == (("x",), ("other/",))
        assert len(scanned) == 1
        assert len(LocalStore(tmp_path).list("other/").prefixes) == 50
        assert len(scanned) == 2
        assert len(LocalStore(tmp_path).list("", None).files) == 51
        assert len(scanned) == 2 + 52

    def test_only_a_full_listing_fails_on_unreadable_folders(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The refusal is simulated, because root may read all folders."""
        (tmp_path / "lost+found").mkdir()
        scandir = os.scandir

        def refusing(path: str) -> Any:
            if "lost+found" in str(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refusing)
        store = LocalStore(tmp_path)
        put(store, "x", b"1")
        assert store.list().prefixes == ("lost+found/",)
        with pytest.raises(PermissionError):
            store.list("", None)

    def test_links_to_folders_are_listed_and_not_followed(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path / "run")
        put(store, "step/x", b"1")
        put(LocalStore(tmp_path / "elsewhere"), "y", b"1")
        (tmp_path / "run/link").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "run/loop").symlink_to("loop")
        (tmp_path / "run/broken").symlink_to("missing")
        found = store.list()
        assert sorted(found.prefixes) == ["link/", "step/"]
        assert sorted(found.files) == ["broken", "loop"]
        assert sorted(store.list("", None).files) == ["broken", "loop", "step/x"]
        assert [store.is_link(name) for name in ("link", "step")] == [True, False]
        assert list_folders(store) == ["link", "step"]
        assert list_folders(store, links=False) == ["step"]

    def test_relative_root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for root in ("", ".", "new"):
            store = LocalStore(root)
            put(store, "x", b"1")
            store.sync()
            store.put("x", b"2", mode="replace")
            assert list(names_in(store)) in (["x"], ["new/x"])
            store.delete("x")


def test_an_unclosed_file_is_closed_without_a_warning(tmp_path: Path) -> None:
    before = descriptors()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file = opened(str(tmp_path / "x"), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        assert os.write(file.fileno(), b"1") == 1
        assert descriptors() == before + 1
        del file
    assert caught == []
    assert descriptors() == before


def test_opening_a_folder_raises_and_leaks_no_descriptor(tmp_path: Path) -> None:
    before = descriptors()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"not a regular file.*folder"):
        LocalStore(tmp_path).get_range("folder", 0, 1)
    with pytest.raises(FileNotFoundError) as caught:
        opened(str(tmp_path / "none"), os.O_RDONLY)
    assert caught.value.filename == str(tmp_path / "none")
    assert descriptors() == before


def test_open_store_takes_paths_and_stores(tmp_path: Path) -> None:
    assert isinstance(open_store(tmp_path), LocalStore)
    assert open_store(str(tmp_path)).url == str(tmp_path)
    memory = MemoryStore()
    assert open_store(memory) is memory
    with pytest.raises(ValueError, match="s3://bucket/run"):
        open_store("s3://bucket/run")
    with pytest.raises(TypeError, match="int"):
        open_store(3)  # type: ignore[arg-type]


def fail_with(number: int):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def path_of(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())
