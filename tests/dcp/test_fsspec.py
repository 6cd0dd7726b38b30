"""Torch's file systems work as stores, and so do the reader and the writer for fsspec."""

from __future__ import annotations

import inspect
import io
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("fsspec")

import torch.distributed.checkpoint as stock_dcp
import torch.distributed.checkpoint.filesystem as stock_files

import shardkeep as sk
import shardkeep.dcp as dcp
from shardkeep.checkpoint.reader import open_reader
from shardkeep.dcp.bridge.safetensors import Folder, Part, part_content
from shardkeep.dcp.bridge.torch_filesystem import FsspecStore, StreamStore, store_of
from shardkeep.dcp.bridge.torch_modules import torch_module
from shardkeep.dcp.fsspec_filesystem import FsspecReader, FsspecWriter
from shardkeep.stores import LocalStore
from shardkeep.stores.contract import Store
from stores.test_stores import StoreProperties
from support.dcp_files import OwnLoadPlanner, OwnSavePlanner, blank, writer_options
from support.scenarios import equal, values
from support.store_files import names_in

stock = torch_module("fsspec_filesystem", "_fsspec_filesystem")

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:.*no process group"),
]

FRESH = itertools.count()


class Dictionary(stock_files.FileSystemBase):
    """A user's file system: files in a dictionary, visible once they are closed; without `ls`."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.calls: list[str] = []

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        self.calls.append(f"{mode} {path}")
        stream = io.BytesIO(self.files[path] if mode == "rb" else b"")
        yield stream
        if mode == "wb":
            self.files[path] = stream.getvalue()

    def concat_path(self, path: Any, suffix: str) -> str:
        return f"{path}/{suffix}"

    def rename(self, path: Any, new_path: Any) -> None:
        if new_path in self.files:
            raise KeyError(f"{new_path} is there")
        self.files[new_path] = self.files.pop(path)

    def init_path(self, path: Any) -> str:
        return str(path)

    def mkdir(self, path: Any) -> None:
        self.calls.append(f"mkdir {path}")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def exists(self, path: Any) -> bool:
        return path in self.files

    def rm_file(self, path: Any) -> None:
        del self.files[path]


class Listing(Dictionary):
    """The file system with an `ls` that returns bare names of one level, as some do."""

    def ls(self, path: Any) -> list[str]:
        below = [name[len(path) + 1 :] for name in self.files if name.startswith(f"{path}/")]
        return sorted({name.split("/")[0] for name in below})


class Local(stock_files.FileSystem):
    """A subclass of torch's own file system."""

    def exists(self, path: Any) -> bool:
        return super().exists(path)


class TestListing(StoreProperties):
    """The store properties on a user's file system."""

    def make_store(self, folder: Path) -> Store:
        return StreamStore(Listing(), "root")


class TestLocal(StoreProperties):
    """The store properties on a user's variant of torch's local file system."""

    def make_store(self, folder: Path) -> Store:
        fs = Local()
        return StreamStore(fs, fs.init_path(folder / "run" / "step"))


class TestFsspecMemory(StoreProperties):
    """The store properties on fsspec's memory, where streams of a file share a position."""

    def make_store(self, folder: Path) -> Store:
        return fsspec_store(f"memory://run{next(FRESH)}/step")


class TestFsspecStreams(StoreProperties):
    """The store properties on fsspec's files in memory, through streams alone."""

    def make_store(self, folder: Path) -> Store:
        fs = stock._FileSystem() if hasattr(stock, "_FileSystem") else stock.FileSystem()
        return StreamStore(fs, fs.init_path(f"memory://run{next(FRESH)}/step"))


class TestFsspecFiles(StoreProperties):
    """The store properties on fsspec's local files."""

    def make_store(self, folder: Path) -> Store:
        return fsspec_store(f"file://{folder}/run/step")


def fsspec_store(url: str) -> Store:
    store = store_of(stock.FsspecWriter(url))
    assert type(store) is FsspecStore
    return store


def state() -> dict[str, Any]:
    return {
        "w": values("w", (300, 1000), torch.float32),
        "half": values("half", (7,), torch.bfloat16),
        "nested": {"list": [torch.ones(2), {"x": 1}], "none": torch.zeros(0, 3)},
        "step": 3,
    }


def url(where: str, tmp_path: Path) -> str:
    return f"file://{tmp_path}/run" if where == "file" else f"memory://run{next(FRESH)}"


@pytest.mark.parametrize("where", ["file", "memory"])
@pytest.mark.parametrize("planner", [None, OwnSavePlanner], ids=["engine", "steps"])
@pytest.mark.parametrize("name", ["plain", "3 threads", "file per item", "zstd"])
def test_checkpoints_are_saved_and_loaded_at_urls(tmp_path, where, planner, name):
    path, saved = url(where, tmp_path), state()
    options, _ = writer_options(name)
    for number in (1, 2):  # the second one overwrites
        saved["step"] = number
        writer = FsspecWriter(path, **options)
        dcp.save(saved, storage_writer=writer, planner=planner and planner())
    store = store_of(writer)
    assert type(store) is FsspecStore
    source = open_reader(store)
    assert source.kind == "shardkeep"
    assert source.verify().ok
    data = [name for name in names_in(store) if name.endswith(".distcp")]
    assert sorted(data) == sorted(source.index.files), "what was overwritten is gone"
    for reader, own in ((stock_dcp, None), (dcp, None), (dcp, OwnLoadPlanner())):
        loaded = blank(saved)
        reader.load(loaded, checkpoint_id=path, planner=own)
        assert equal(loaded, saved), (reader, own)
    reader = FsspecReader(path)
    assert reader.read_metadata().storage_meta.save_id == source.found.trailer.save_id


@pytest.mark.parametrize("where", ["file", "memory"])
def test_checkpoints_of_stock_torch_are_loaded_from_a_url(tmp_path, where):
    path, saved = url(where, tmp_path), state()
    stock_dcp.save(saved, storage_writer=stock.FsspecWriter(path, thread_count=2))
    for own in (None, OwnLoadPlanner()):
        loaded = blank(saved)
        dcp.load(loaded, storage_reader=FsspecReader(path), planner=own)
        assert equal(loaded, saved)


def test_a_url_needs_no_storage_objects(tmp_path):
    path, saved = url("file", tmp_path), state()
    dcp.save(saved, checkpoint_id=path)
    loaded = blank(saved)
    dcp.load(loaded, checkpoint_id=path)
    assert equal(loaded, saved)
    assert (tmp_path / "run" / ".metadata").exists()


def test_signatures_equal_torchs_and_classes_extend_its_classes():
    for ours, theirs_ in ((FsspecWriter, stock.FsspecWriter), (FsspecReader, stock.FsspecReader)):
        assert inspect.signature(ours) == inspect.signature(theirs_)
        assert issubclass(ours, theirs_)
    import shardkeep.dcp._fsspec_filesystem as older

    assert older.FsspecWriter is FsspecWriter
    assert issubclass(older.FileSystem, stock_files.FileSystemBase)
    assert not FsspecWriter.validate_checkpoint_id(Path("x"))
    assert FsspecWriter.validate_checkpoint_id("memory://x")


def test_options_are_passed_to_fsspec():
    writer = FsspecWriter("memory://options", use_listings_cache=False)
    assert writer.fs.fs.storage_options == {"use_listings_cache": False}
    assert FsspecReader("memory://options", skip_instance_cache=True).path == "memory://options"


@pytest.mark.parametrize("kind", [Dictionary, Listing])
@pytest.mark.parametrize("planner", [None, OwnSavePlanner], ids=["engine", "steps"])
def test_file_systems_of_users(kind, planner):
    fs = kind()

    class Writer(dcp.FileSystemWriter):
        """A writer as users have it: torch's with another file system."""

        def __init__(self, path: Any) -> None:
            super().__init__("anywhere")
            self.fs, self.path = fs, fs.init_path(path)

    class Reader(dcp.FileSystemReader):
        """A reader as users have it: torch's with another file system."""

        def __init__(self, path: Any) -> None:
            super().__init__("anywhere")
            self.fs, self.path = fs, fs.init_path(path)

    saved = state()
    for number in (1, 2):
        saved["step"] = number
        dcp.save(saved, storage_writer=Writer("place"), planner=planner and planner())
        assert len([name for name in fs.files if name.endswith(".distcp")]) == 1
        for own in (None, OwnLoadPlanner()):
            loaded = blank(saved)
            dcp.load(loaded, storage_reader=Reader("place"), planner=own)
            assert equal(loaded, saved)
    assert {name.split("/")[0] for name in fs.files} == {"place"}
    assert not any(".tmp" in name or ".old" in name for name in fs.files)


def test_a_failing_file_system_leaves_the_old_checkpoint():
    class Failing(Listing):
        """A file system whose renames fail."""

        fails = False

        def rename(self, path: Any, new_path: Any) -> None:
            if self.fails:
                raise OSError("can't rename")
            super().rename(path, new_path)

    fs = Failing()
    store = StreamStore(fs, "place")
    sk.save({"n": 1}, store)
    fs.fails = True
    with pytest.raises(OSError, match="can't rename"):
        sk.save({"n": 2}, store, overwrite=True)
    assert sk.open(StreamStore(fs, "place")).read("n") == 1


def test_safetensors_exist_at_all_times_while_they_are_replaced():
    class Failing(Listing):
        """A file system that can fail to rename temporary files."""

        fails = False

        def rename(self, path: Any, new_path: Any) -> None:
            if self.fails and path.endswith(".tmp"):
                raise OSError("can't rename")
            super().rename(path, new_path)

    def write(number: float) -> None:
        part = Part("w", torch.full((3,), number), (0,))
        folder.write(
            {"model.safetensors": part_content([part])}, threads=1, max_window_bytes=1 << 20
        )

    fs = Failing()
    folder = Folder("place", fs)
    write(1)
    write(2)  # the first one went aside, and then away
    old = dict(fs.files)
    assert list(old) == ["place/model.safetensors"]
    fs.fails = True
    with pytest.raises(OSError, match="can't rename"):
        write(3)
    assert fs.files == old


def test_a_folder_that_cannot_be_listed_is_not_taken_for_a_file(tmp_path):
    class Locked(Local):
        def ls(self, path: Any) -> list[str]:
            if Path(path).name == "locked":
                raise PermissionError(13, "Permission denied", str(path))
            if Path(path).is_file():
                raise ValueError("a file has no list")  # who knows what somebody's says of one
            return [str(one) for one in Path(path).iterdir()]

    fs = Locked()
    store = StreamStore(fs, fs.init_path(tmp_path))
    for name in ("x", "a/y"):
        store.put(name, b"1", mode="replace")
    assert sorted(names_in(store)) == ["a/y", "x"]
    (tmp_path / "a" / "locked").mkdir()
    with pytest.raises(PermissionError, match="locked"):
        list(names_in(store))


def test_local_paths_are_accessed_by_the_engine(tmp_path):
    writer = dcp.FileSystemWriter(tmp_path)
    assert type(store_of(writer)) is LocalStore
    writer.fs.create_stream = lambda path, mode: None
    assert type(store_of(writer)) is StreamStore
