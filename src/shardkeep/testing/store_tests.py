"""The conformance suite for stores: what `shardkeep.stores.contract.Store` promises, as tests."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import pytest

from shardkeep.settings import PAGE
from shardkeep.stores.abilities import (
    SupportsFolders,
    SupportsPositionedWrites,
    SupportsReadRows,
    SupportsReadSteps,
)
from shardkeep.stores.contract import IfMatch, PreconditionFailed, Store
from shardkeep.stores.folders import list_folders, remove_folder, subfolder

__all__ = ["StoreTests"]

_BAD_NAMES = ["", ".", "/", "/etc/passwd", "..", "../x", "a/../../x", "a\0b", "a/", "a/.", "\ud800"]


class _Stop(Exception):
    """Raised by a test inside the block of a writer."""


class StoreTests:
    """Tests that every store must pass. Subclass it and say how to make a store.

    Abilities that the store does not have are not tested. Each test gets a new and empty store.

    Example:
        >>> from shardkeep.testing import StoreTests
        >>> class TestMyStore(StoreTests):
        ...     def make_store(self, folder):
        ...         return MyStore(folder)
    """

    def make_store(self, folder: Path) -> Store:
        """Return a new and empty store, which may keep its files in `folder`."""
        raise NotImplementedError(f"{type(self).__name__} must say how to make a store")

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        """The store of one test."""
        store = self.make_store(tmp_path)
        try:
            yield store
        finally:
            store.close()

    # --- what is missing, and names ---------------------------------------------------------------

    def test_has_the_members_of_a_store(self, store: Store) -> None:
        assert isinstance(store, Store)
        assert store.url
        assert store.hints.request_bytes > 0
        assert store.hints.concurrency > 0

    def test_an_empty_store_lists_nothing(self, store: Store) -> None:
        assert _names(store) == []
        for delimiter in ("/", None):
            for prefix in ("", "a/", "a/b/"):
                found = store.list(prefix, delimiter)
                assert (list(found.files), list(found.prefixes)) == ([], [])

    @pytest.mark.parametrize("call", ["head", "get_range", "get_ranges", "read_into"])
    def test_a_missing_file_is_named(self, store: Store, call: str) -> None:
        with pytest.raises(FileNotFoundError) as caught:
            _reads(store, "a/b")[call]()
        assert str(caught.value.filename).endswith("a/b")

    @pytest.mark.parametrize("name", _BAD_NAMES)
    def test_bad_names_are_refused(self, store: Store, name: str) -> None:
        for call in (*_reads(store, name).values(), *_changes(store, name)):
            with pytest.raises(ValueError, match="bad file name") as caught:
                call()
            assert repr(name) in str(caught.value)

    def test_names_have_one_plain_form(self, store: Store) -> None:
        _write(store, "a/./b/../c", b"1")
        assert _names(store) == ["a/c"]
        assert store.get_range("x/../a//c", 0, 9) == b"1"

    def test_names_can_contain_any_other_character(self, store: Store) -> None:
        names = ["a/**b", "a/*", "a/?", "a/[bc]", "a/ü ‽", "a/\"\\'", "a/%20", "a/#?x=1", "a/\n"]
        for name in names:
            _write(store, name, name.encode())
        assert _names(store) == sorted(names)
        for name in names:
            assert store.get_range(name, 0, 100) == name.encode()

    @pytest.mark.parametrize("name", ["a/**b", "a/*", "a/?", "a/[bc]"])
    def test_a_name_that_looks_like_a_pattern_is_a_name(self, store: Store, name: str) -> None:
        others = ["a/b", "a/c", "a/xb"]
        for each in (name, *others):
            _write(store, each, b"1")
        store.delete(name)
        assert _names(store) == others

    # --- listing ----------------------------------------------------------------------------------

    def test_a_listing_with_delimiter_has_files_and_prefixes(self, store: Store) -> None:
        for name in ("x", "a/y", "a/b/z", "ab/w"):
            _write(store, name, b"1")
        found = store.list()
        assert (sorted(found.files), sorted(found.prefixes)) == (["x"], ["a/", "ab/"])
        found = store.list("a/")
        assert (sorted(found.files), sorted(found.prefixes)) == (["a/y"], ["a/b/"])
        found = store.list("a/b/")
        assert (sorted(found.files), sorted(found.prefixes)) == (["a/b/z"], [])

    def test_a_listing_without_delimiter_has_all_files_below_a_prefix(self, store: Store) -> None:
        names = ["a/b/z", "a/y", "ab/w", "x"]
        for name in names:
            _write(store, name, b"1")
        assert sorted(store.list("", None).files) == names
        assert sorted(store.list("a/", None).files) == ["a/b/z", "a/y"]
        assert list(store.list("a/", None).prefixes) == []

    @pytest.mark.parametrize("prefix", ["a", "/", "../", "a/../../"])
    def test_bad_prefixes_are_refused(self, store: Store, prefix: str) -> None:
        with pytest.raises(ValueError, match="bad"):
            store.list(prefix)

    def test_folders_can_be_used_as_stores(self, store: Store) -> None:
        _write(store, "a/b/x", b"1")
        _write(store, "y", b"2")
        assert list(list_folders(store)) == ["a"]
        inner = subfolder(subfolder(store, "a"), "b")
        assert _names(inner) == ["x"]
        inner.put("z", b"3", mode="create")
        assert store.get_range("a/b/z", 0, 9) == b"3"
        assert _names(subfolder(store, "missing")) == []

    # --- reading ----------------------------------------------------------------------------------

    @pytest.mark.parametrize("seed", range(20))
    def test_what_is_read_is_what_was_written(self, store: Store, seed: int) -> None:
        random = Random(seed)
        parts = [random.randbytes(random.randrange(300)) for _ in range(random.randrange(6))]
        whole, name = b"".join(parts), "folder/file"
        with store.open_writer(name) as writer:
            for part in parts:
                writer.write(part)
        assert store.head(name).size == len(whole)
        ranges = [(random.randrange(1600), random.randrange(1600)) for _ in range(10)]
        expected = [whole[start : start + length] for start, length in ranges]
        starts, lengths = zip(*ranges, strict=True)
        assert list(store.get_ranges(name, starts, lengths)) == expected
        for (start, length), data in zip(ranges, expected, strict=True):
            assert store.get_range(name, start, length) == data
            buffer = bytearray(b"\xa5" * length)
            assert store.read_into(name, start, memoryview(buffer)) == len(data)
            assert buffer == data + b"\xa5" * (length - len(data))

    def test_reads_into_any_shape(self, store: Store) -> None:
        _write(store, "x", bytes(range(16)))
        target = bytearray(16)
        assert store.read_into("x", 0, memoryview(target).cast("H").cast("B", (2, 8))) == 16
        assert target == bytes(range(16))

    def test_a_large_length_takes_no_memory(self, store: Store) -> None:
        _write(store, "x", b"abc")
        assert store.get_range("x", 1, 1 << 62) == b"bc"
        assert store.get_range("x", 1 << 62, 1 << 62) == b""

    @pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, -1)])
    def test_negative_ranges_are_refused(self, store: Store, start: int, length: int) -> None:
        _write(store, "x", b"abc")
        with pytest.raises(ValueError, match="bad range"):
            store.get_range("x", start, length)
        with pytest.raises(ValueError, match="bad range"):
            store.get_ranges("x", [0, start], [1, length])

    # --- writing ----------------------------------------------------------------------------------

    def test_any_buffer_can_be_written(self, store: Store) -> None:
        square = memoryview(bytes(range(16))).cast("B", (4, 4))
        with store.open_writer("x") as writer:
            for data in (b"one", bytearray(b"two"), memoryview(b"-three-")[1:-1], b"", square):
                writer.write(data)
        assert store.get_range("x", 0, 99) == b"onetwothree" + bytes(range(16))
        store.put("y", square, mode="create")
        assert store.get_range("y", 0, 99) == bytes(range(16))

    def test_a_writer_refuses_a_file_that_exists(self, store: Store) -> None:
        _write(store, "a/x", b"old")
        with pytest.raises(FileExistsError) as caught, store.open_writer("a/x") as writer:
            writer.write(b"new")
        assert str(caught.value.filename).endswith("a/x")
        assert store.get_range("a/x", 0, 9) == b"old"

    def test_an_exception_inside_a_writer_leaves_nothing(self, store: Store) -> None:
        with pytest.raises(_Stop), store.open_writer("a/x") as writer:
            writer.write(b"half")
            raise _Stop
        assert _names(store) == []
        _write(store, "a/x", b"again")
        assert store.get_range("a/x", 0, 9) == b"again"

    def test_put_replaces(self, store: Store) -> None:
        for data in (b"first", b"2nd", b""):
            store.put("deep/down/x", data, mode="replace")
            assert store.get_range("deep/down/x", 0, 99) == data
            assert store.head("deep/down/x").size == len(data)
        assert _names(store) == ["deep/down/x"]

    def test_put_is_atomic_for_readers(self, store: Store) -> None:
        contents = [b"a" * 70_000, b"b" * 50_000]
        store.put("x", contents[0], mode="replace")
        seen, stop, both = set(), threading.Event(), threading.Event()

        def look() -> None:
            while not stop.is_set():
                seen.add(store.get_range("x", 0, 100_000))
                if len(seen) > 1:
                    both.set()

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(look) for _ in range(2)]
            try:
                for turn in range(5000):
                    store.put("x", contents[turn % 2], mode="replace")
                    if turn >= 60 and both.is_set():
                        break
            finally:
                stop.set()
            for reader in readers:
                reader.result()
        assert seen == set(contents)

    def test_delete(self, store: Store) -> None:
        _write(store, "x", b"1")
        assert store.get_range("x", 0, 1) == b"1"
        store.delete("x")
        store.delete("x")
        with pytest.raises(FileNotFoundError):
            store.get_range("x", 0, 1)
        _write(store, "x", b"2")
        assert store.get_range("x", 0, 1) == b"2"

    # --- conditions -------------------------------------------------------------------------------

    def test_put_creates_only_what_is_missing(self, store: Store) -> None:
        store.put("a/x", b"old", mode="create")
        with pytest.raises(FileExistsError) as caught:
            store.put("a/x", b"new", mode="create")
        assert str(caught.value.filename).endswith("a/x")
        assert store.get_range("a/x", 0, 9) == b"old"
        store.delete("a/x")
        store.put("a/x", b"new", mode="create")
        assert store.get_range("a/x", 0, 9) == b"new"
        assert _names(store) == ["a/x"]

    def test_put_replaces_only_the_expected_version(self, store: Store) -> None:
        store.put("a/x", b"one", mode="create")
        first = _version(store, "a/x")
        store.put("a/x", b"two", mode=IfMatch(first))
        second = _version(store, "a/x")
        with pytest.raises(PreconditionFailed) as caught:
            store.put("a/x", b"six", mode=IfMatch(first))
        assert str(caught.value.filename).endswith("a/x")
        assert store.get_range("a/x", 0, 9) == b"two"
        assert _version(store, "a/x") == second
        store.delete("a/x")
        with pytest.raises(PreconditionFailed):
            store.put("a/x", b"six", mode=IfMatch(second))
        assert _names(store) == []

    def test_versions_differ_and_stay(self, store: Store) -> None:
        found = []
        for number in range(5):
            store.put("x", b"%d" % number, mode="replace")
            found.append(_version(store, "x"))
            assert _version(store, "x") == found[-1]
        assert len(set(found)) == len(found)

    @pytest.mark.parametrize("how", ["open_writer", "put"])
    def test_one_of_many_creators_wins(self, store: Store, how: str) -> None:
        def create(number: int) -> bool:
            try:
                if how == "put":
                    store.put("same/name", bytes([number]), mode="create")
                else:
                    _write(store, "same/name", bytes([number]))
            except FileExistsError:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(16)))
        assert won.count(True) == 1
        assert store.get_range("same/name", 0, 9) == bytes([won.index(True)])
        assert _names(store) == ["same/name"]

    def test_one_of_many_replacers_wins(self, store: Store) -> None:
        store.put("x", b"old", mode="create")
        version = _version(store, "x")

        def replace(number: int) -> bool:
            try:
                store.put("x", bytes([number]), mode=IfMatch(version))
            except PreconditionFailed:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(replace, range(16)))
        assert won.count(True) == 1
        assert store.get_range("x", 0, 9) == bytes([won.index(True)])
        assert _names(store) == ["x"]

    # --- the store as a whole ---------------------------------------------------------------------

    def test_many_threads_can_use_it(self, store: Store) -> None:
        def work(number: int) -> None:
            data = bytes([number]) * (1000 + number)
            _write(store, f"{number % 3}/{number}", data)
            buffer = bytearray(len(data))
            for _ in range(20):
                assert store.read_into(f"{number % 3}/{number}", 0, memoryview(buffer)) == len(data)
                assert buffer == data
            store.sync()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(48)))
        assert len(_names(store)) == 48

    def test_sync_can_be_repeated(self, store: Store) -> None:
        store.sync()
        _write(store, "a/b/c", b"1")
        store.sync()
        store.sync()
        assert store.get_range("a/b/c", 0, 2) == b"1"

    def test_it_can_be_used_after_it_was_closed(self, store: Store) -> None:
        _write(store, "x", b"1")
        assert store.get_range("x", 0, 1) == b"1"
        store.close()
        store.close()
        assert store.get_range("x", 0, 1) == b"1"
        _write(store, "y", b"2")
        assert _names(store) == ["x", "y"]

    # --- abilities --------------------------------------------------------------------------------

    def test_steps_of_a_read_add_up(self, store: Store) -> None:
        if not isinstance(store, SupportsReadSteps):
            pytest.skip("the store does not support reads in steps")
        data = Random(1).randbytes(100_000)
        _write(store, "x", data)
        for start, length in ((0, 100_000), (7, 5000), (99_000, 5000), (200_000, 10)):
            buffer, expected = bytearray(length), data[start : start + length]
            done = 0
            for step in store.read_steps("x", start, memoryview(buffer), 4096):
                assert done < step <= length
                assert buffer[:step] == expected[:step]
                done = step
            assert done == len(expected)

    def test_rows_are_read_where_the_store_can(self, store: Store) -> None:
        if not isinstance(store, SupportsReadRows):
            pytest.skip("the store does not support reads of rows")
        data = Random(2).randbytes(10_000)
        _write(store, "x", data)
        starts = np.array([5, 9000, 200], dtype=np.int64)
        rows = np.zeros((3, 40), dtype=np.uint8)
        if store.read_rows("x", starts, rows):
            assert [row.tobytes() for row in rows] == [data[at : at + 40] for at in starts.tolist()]
        assert store.read_rows("x", np.array([9990], dtype=np.int64), rows[:1]) is False

    def test_positioned_writes(self, store: Store) -> None:
        if not (store.hints.positioned_writes and isinstance(store, SupportsPositionedWrites)):
            pytest.skip("the store does not support positioned writes")
        page = memoryview(mmap.mmap(-1, 2 * PAGE))
        page[:] = Random(3).randbytes(2 * PAGE)
        nbytes = 3 * PAGE - 100
        with store.open_positioned_writer("a/x", nbytes) as writer:
            writer.write_at(2 * PAGE, [page[:PAGE]])  # what exceeds the file is cut off
            writer.write_at(0, [page[PAGE:], page[:PAGE]])
        expected = (bytes(page[PAGE:]) + 2 * bytes(page[:PAGE]))[:nbytes]
        assert store.get_range("a/x", 0, 4 * PAGE) == expected
        with pytest.raises(FileExistsError):
            store.open_positioned_writer("a/x", 1)
        with pytest.raises(_Stop), store.open_positioned_writer("a/y", PAGE):
            raise _Stop
        assert _names(store) == ["a/x"]

    def test_only_empty_folders_are_removed(self, store: Store) -> None:
        _write(store, "a/x", b"1")
        remove_folder(store, "a")
        remove_folder(store, "missing")
        assert _names(store) == ["a/x"]
        store.delete("a/x")
        remove_folder(store, "a")
        if isinstance(store, SupportsFolders):
            assert not store.is_link("a")
            assert list(list_folders(store, links=False)) == []


def _names(store: Store) -> list[str]:
    return sorted(store.list("", None).files)


def _version(store: Store, name: str) -> str:
    return store.head(name).version


def _write(store: Store, name: str, data: bytes) -> None:
    with store.open_writer(name) as writer:
        writer.write(data)


def _reads(store: Store, name: str) -> dict[str, Callable[[], object]]:
    return {
        "head": lambda: store.head(name),
        "get_range": lambda: store.get_range(name, 0, 1),
        "get_ranges": lambda: store.get_ranges(name, [0], [1]),
        "read_into": lambda: store.read_into(name, 0, memoryview(bytearray(1))),
    }


def _changes(store: Store, name: str) -> list[Callable[[], object]]:
    return [
        lambda: store.open_writer(name),
        lambda: store.put(name, b"", mode="replace"),
        lambda: store.put(name, b"", mode="create"),
        lambda: store.put(name, b"", mode=IfMatch("1")),
        lambda: store.delete(name),
    ]
