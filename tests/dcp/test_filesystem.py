"""Torch's file system reader and writer produce Shardkeep's bytes when their steps are called."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.distributed.checkpoint as stock
import torch.distributed.checkpoint.filesystem as stock_files
import torch.distributed.checkpoint.planner as stock_planner
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as Legacy
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

import shardkeep as sk
import shardkeep.dcp as dcp
from shardkeep.checkpoint.leases import lease_save_id
from shardkeep.checkpoint.reader import open_reader
from shardkeep.dcp.bridge.metadata_file import metadata_in
from shardkeep.format.dcp.trailer import TRAILER_SIZE
from shardkeep.stores import LocalStore
from support import dcp_files
from support.dcp_files import OPTIONS, OwnLoadPlanner, OwnSavePlanner, blank, kinds, save
from support.scenarios import equal, same, values

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:.*no process group"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]


def state() -> dict[str, Any]:
    return {
        "w": values("w", (40, 50), torch.float32),
        "b": values("b", (300, 1000), torch.bfloat16),
        "odd": values("odd", (6, 4), torch.int16).t(),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "none": torch.zeros(0, 3),
        "flags": values("flags", (5,), torch.bool),
        "nested": {"list": [torch.ones(2), {"x": 1}], "text": "abc" * 10},
        "step": 3,
    }


TENSORS = ("w", "b", "odd", "scalar", "none", "flags")


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("planner", [None, OwnSavePlanner], ids=["engine", "steps"])
def test_files_equal_those_of_stock_and_each_loads_both(tmp_path, name, planner):
    saved = state()
    safetensors = name.startswith("safetensors")
    if safetensors:  # Stock torch puts objects at the start, so its files are invalid.
        saved = {key: saved[key] for key in TENSORS if key != "odd"}
    save(stock, saved, tmp_path / "stock", name)
    save(dcp, saved, tmp_path / "ours", name, planner and planner())
    found, expected = kinds(tmp_path / "ours"), kinds(tmp_path / "stock")
    assert {k: n for k, n in found.items() if k[1] != "empty"}.keys() == {
        k for k in expected if k[1] != "empty"
    }
    source = sk.open(tmp_path / "ours")
    assert found.total() == expected.total()
    assert source.verify().ok
    for writer in ("ours",) if safetensors else ("stock", "ours"):
        for reader, own in ((stock, None), (dcp, None), (dcp, OwnLoadPlanner())):
            if safetensors and reader is stock:
                continue
            loaded = blank(saved)
            reader.load(loaded, checkpoint_id=tmp_path / writer, planner=own)
            assert equal(loaded, saved), (writer, reader, own)


@pytest.mark.gloo
@pytest.mark.parametrize("names", [list(OPTIONS)[:6], list(OPTIONS)[6:]], ids=["files", "formats"])
def test_files_on_ranks_equal_those_of_stock(gloo, tmp_path, names):
    assert gloo.run(dcp_files.same_files, str(tmp_path), names) == ["fine"] * 4


@pytest.mark.gloo
def test_ranks_that_commit_alone_load_their_own_values(gloo, tmp_path):
    assert gloo.run(dcp_files.each_its_own, str(tmp_path)) == ["fine"] * 4


def test_safetensors_files_are_valid(tmp_path):
    opened = pytest.importorskip("safetensors.torch").load_file
    saved = state()
    save(dcp, saved, tmp_path, "safetensors, 2 threads")
    found: dict[str, Any] = {}
    for file in tmp_path.glob("*.distcp"):
        found |= opened(file)
    assert all(same(found[name], saved[name]) for name in TENSORS)
    assert found["step"].dtype == torch.uint8
    loaded = blank(saved)
    dcp.load(loaded, checkpoint_id=tmp_path)
    assert equal(loaded, saved)
    leave_what_stock_knows(tmp_path)
    loaded = blank(saved)
    dcp.load(loaded, checkpoint_id=tmp_path, planner=OwnLoadPlanner())
    assert equal(loaded, saved), "without the manifest, too"


def leave_what_stock_knows(folder: Path) -> None:
    """Reduce a checkpoint to the files that stock torch has."""
    for file in folder.glob(".manifest-*"):
        file.unlink()
    metadata = folder / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:-TRAILER_SIZE])


def test_two_shards_of_a_tensor_in_one_safetensors_file(tmp_path):
    opened = pytest.importorskip("safetensors.torch").load_file
    whole = values("w", (6, 4), torch.float32)
    SHARD = stock_planner.WriteItemType.SHARD

    class Halves(dcp.DefaultSavePlanner):
        """A planner that writes `w` as two chunks."""

        def create_local_plan(self):
            plan = super().create_local_plan()
            (item,) = plan.items
            halves = []
            for number in (0, 1):
                offset = torch.Size((3 * number, 0))
                chunk = dataclasses.replace(
                    item.tensor_data.chunk, offsets=offset, sizes=torch.Size((3, 4))
                )
                data = dataclasses.replace(item.tensor_data, chunk=chunk)
                index = MetadataIndex("w", offset, number)
                halves.append(stock_planner.WriteItem(index, SHARD, tensor_data=data))
            self.plan = dataclasses.replace(plan, items=halves)
            return self.plan

        def resolve_data(self, write_item):
            start = write_item.index.offset[0]
            return whole[start : start + 3]

    save(dcp, {"w": whole}, tmp_path, "safetensors", Halves())
    (file,) = tmp_path.glob("*.distcp")
    found = opened(file)
    assert found.keys() == {"w", "w [3:6, 0:4]"}
    assert same(torch.cat([found["w"], found["w [3:6, 0:4]"]]), whole)
    loaded = {"w": torch.zeros(6, 4)}
    dcp.load(loaded, checkpoint_id=tmp_path)
    assert same(loaded["w"], whole)


def test_safetensors_and_streams_exclude_each_other(tmp_path):
    options = OPTIONS["safetensors"] | {"_extensions": [Rot13()]}
    writer = dcp.FileSystemWriter(tmp_path, **options)
    with pytest.raises(dcp.CheckpointException, match="SAFETENSORS can't be combined"):
        dcp.save({"a": torch.ones(1)}, storage_writer=writer)


class Rotated(io.RawIOBase):
    def __init__(self, inner: Any, by: int) -> None:
        self._inner, self._by = inner, by

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        turned = bytes((byte + self._by) % 256 for byte in bytes(data))
        self._inner.write(turned)
        return len(turned)

    def readinto(self, buffer: Any) -> int:
        data = self._inner.read(len(buffer))
        buffer[: len(data)] = bytes((byte + self._by) % 256 for byte in data)
        return len(data)


class Rot13(StreamTransformExtension):
    """A user's own extension."""

    by = 13

    @staticmethod
    def registry_name() -> str:
        return "stream.rot13"

    @staticmethod
    def from_descriptor(version: str) -> Rot13:
        return Rot13()

    def get_descriptor(self) -> str:
        return f"{self.registry_name()}/1"

    def transform_to(self, output: Any) -> Any:
        return Rotated(output, self.by)

    def transform_from(self, input: Any) -> Any:
        return Rotated(input, -self.by)


@pytest.mark.parametrize(("writer", "reader"), [(stock, dcp), (dcp, stock), (dcp, dcp)])
def test_extensions_of_users(tmp_path, writer, reader):
    saved = {"w": values("w", (7, 5), torch.float32), "step": 4}
    writer.save(saved, storage_writer=writer.FileSystemWriter(tmp_path, _extensions=[Rot13()]))
    registry = ExtensionRegistry()
    registry.register(Rot13)
    loaded = blank(saved)
    files = reader.FileSystemReader(tmp_path, _extension_registry=registry)
    reader.load(loaded, storage_reader=files)
    assert equal(loaded, saved)
    if reader is dcp:
        with pytest.raises(sk.FormatError, match=r"unknown stream transform .stream\.rot13/1"):
            dcp.load(blank(saved), checkpoint_id=tmp_path)


def test_two_stream_transforms_are_undone_in_the_right_order(tmp_path):
    from torch.distributed.checkpoint._extension import ZStandard

    saved = {"w": values("w", (7, 5), torch.float32), "step": 4}
    writer = dcp.FileSystemWriter(tmp_path, _extensions=[Rot13(), ZStandard()])
    dcp.save(saved, storage_writer=writer)
    registry = ExtensionRegistry()
    registry.register(Rot13)
    loaded = blank(saved)
    reader = dcp.FileSystemReader(tmp_path, _extension_registry=registry)
    dcp.load(loaded, storage_reader=reader)
    assert equal(loaded, saved)


def flip(folder: Path, name: str, where: str) -> None:
    """Change one byte of an item."""
    source = sk.open(folder)
    if where == "object":
        item = source[name].item
        at = item.offset + item.length // 2
    else:
        (chunk,) = source.tensor(name).chunks
        item = chunk.item
        at = item.offset + item.length - item.length // 3
    data = bytearray((folder / item.file).read_bytes())
    data[at] ^= 0x10
    (folder / item.file).write_bytes(data)


@pytest.mark.parametrize("how", ["plain", "zstd", "safetensors"])
@pytest.mark.parametrize(("name", "where"), [("b", "tensor"), ("nested.text", "object")])
def test_a_flipped_byte_is_damage(tmp_path, how, name, where):
    saved = state()
    save(dcp, saved, tmp_path, how, OwnSavePlanner())
    flip(tmp_path, name, where)
    assert not sk.open(tmp_path).verify().ok
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(blank(saved), checkpoint_id=tmp_path, planner=OwnLoadPlanner())
    (error, _) = caught.value.failures[0]
    assert isinstance(error, sk.Damaged | sk.FormatError)
    assert repr(name) in str(error)


def test_the_old_checkpoint_stays_until_the_new_one_is_committed(tmp_path):
    old, new = {"w": torch.ones(3), "n": 1}, {"w": torch.zeros(3), "n": 2}
    dcp.save(old, checkpoint_id=tmp_path)

    class Failing(dcp.FileSystemWriter):
        def finish(self, metadata, results):
            raise OSError("no space")

    with pytest.raises(dcp.CheckpointException, match="no space"):
        dcp.save(new, storage_writer=Failing(tmp_path))
    loaded = blank(old)
    dcp.load(loaded, checkpoint_id=tmp_path)
    assert equal(loaded, old)
    writer = dcp.FileSystemWriter(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in (1, 2):  # without a reset in between, as torch allows
            new["n"] = number
            dcp.save(new, storage_writer=writer, planner=OwnSavePlanner())
    dcp.load(loaded, checkpoint_id=tmp_path)
    assert equal(loaded, new)
    orphans = {file.name for file in tmp_path.iterdir()} - set(open_reader(tmp_path).index.files)
    assert len(orphans) == 2, "the metadata and the manifest: what the failed save left has gone"


def test_failed_writes_leave_nothing_and_are_raised(tmp_path):
    class Breaking(dcp.DefaultSavePlanner):
        def resolve_data(self, write_item):
            if write_item.index.fqn == "b":
                raise ValueError("can't give b")
            return super().resolve_data(write_item)

    writer = dcp.FileSystemWriter(tmp_path, thread_count=3)
    with pytest.raises(dcp.CheckpointException, match="can't give b"):
        dcp.save(state(), storage_writer=writer, planner=Breaking())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_ends_its_lease_and_is_raised_even_if_nothing_can_be_removed(
    tmp_path, monkeypatch
):
    class Breaking(dcp.DefaultSavePlanner):
        def resolve_data(self, write_item):
            raise ValueError("can't give it")

    def delete(self, name):
        if name.endswith(".distcp"):
            raise OSError(errno.EIO, "can't remove", name)
        removes(self, name)

    removes = LocalStore.delete
    monkeypatch.setattr(LocalStore, "delete", delete)
    with pytest.raises(dcp.CheckpointException, match="can't give it"):
        dcp.save(state(), storage_writer=dcp.FileSystemWriter(tmp_path), planner=Breaking())
    assert [file for file in tmp_path.iterdir() if file.suffix != ".distcp"] == []


def test_a_writer_has_one_lease_at_most(tmp_path):
    writer = dcp.FileSystemWriter(tmp_path)
    for _ in range(2):  # the first of these saves is never finished
        writer.set_up_storage_writer(True)
        writer.prepare_global_plan([writer.prepare_local_plan(stock.SavePlan([]))])
        (lease,) = (file.name for file in tmp_path.iterdir())
        assert lease_save_id(lease) == writer.save_id
    writer.release_lease()
    assert list(tmp_path.iterdir()) == []


def test_overwriting_can_be_refused(tmp_path):
    dcp.save({"n": 1}, checkpoint_id=tmp_path)
    writer = dcp.FileSystemWriter(tmp_path, overwrite=False)
    with pytest.raises(RuntimeError, match=r"Checkpoint already exists and self\.overwrite=False"):
        writer.prepare_local_plan(stock.SavePlan([]))
    with pytest.raises(sk.AlreadyExists, match="already holds a checkpoint"):
        writer.prepare_local_plan(stock.SavePlan([]))
    for planner in (None, OwnSavePlanner()):
        with pytest.raises(dcp.CheckpointException, match="Checkpoint already exists"):
            dcp.save({"n": 2}, storage_writer=writer, planner=planner)
    assert sk.open(tmp_path).read("n") == 1


@pytest.mark.parametrize("planner", [None, OwnSavePlanner], ids=["engine", "steps"])
@pytest.mark.parametrize("trusting", [True, False], ids=["manifest", "pickle"])
def test_storage_meta(tmp_path, planner, trusting):
    writer = dcp.FileSystemWriter(tmp_path)
    dcp.save({"a": torch.ones(2)}, storage_writer=writer, planner=planner and planner())
    if not trusting:
        leave_what_stock_knows(tmp_path)
    reader = dcp.FileSystemReader(tmp_path)
    meta = reader.read_metadata().storage_meta
    assert meta.load_id == reader.load_id
    if trusting:
        assert (meta.checkpoint_id, meta.save_id) == (tmp_path, writer.save_id)
        assert len(writer.save_id) == 32


def test_metadata_of_stock_equals_its_pickle(tmp_path):
    stock.save(state(), checkpoint_id=tmp_path)
    reader = dcp.FileSystemReader(tmp_path)
    theirs = stock.FileSystemReader(tmp_path)
    theirs.load_id = reader.load_id
    found = reader.read_metadata()
    assert found == theirs.read_metadata()
    assert repr(found) == repr(theirs.read_metadata())


def test_metadata_with_legacy_properties_and_attributes_of_its_own(tmp_path):
    dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    metadata.state_dict_metadata["a"].properties = Legacy(torch.float32, requires_grad=True)
    metadata.mine = {"extra": [1, 2]}
    metadata.storage_meta.modules.append("m")
    found = metadata_in(pickle.dumps(metadata), file=".metadata")
    assert found == metadata
    assert found.mine == metadata.mine
    assert type(found.state_dict_metadata["a"].properties) is Legacy


@dataclasses.dataclass
class OwnMetadata(Metadata):
    """A user's own class of metadata."""

    note: str = ""


def test_classes_of_users_in_metadata_must_be_trusted(tmp_path):
    made = OwnMetadata({}, storage_data={}, note="hello")
    data = pickle.dumps(made)
    with pytest.raises(sk.Untrusted, match="OwnMetadata"):
        metadata_in(data, file=".metadata")
    with torch.serialization.safe_globals([OwnMetadata]):
        assert metadata_in(data, file=".metadata") == made


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


HOSTILE = {
    "a call": lambda: pickle.dumps(Bomb()),
    "a call inside": lambda: pickle.dumps(Metadata({"a": Bomb()})),
    "no pickle": lambda: b"\x80\x04garbage",
    "a key of something else": lambda: pickle.dumps(
        Metadata({}, storage_data={MetadataIndex(("a",)): 1})  # type: ignore[arg-type]
    ),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_metadata_is_refused(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(data())
    with pytest.raises((sk.Untrusted, sk.FormatError)):
        dcp.FileSystemReader(tmp_path).read_metadata()
    assert [file.name for file in tmp_path.iterdir()] == [".metadata"]


def test_a_missing_checkpoint_raises_both_classes(tmp_path):
    for error in (FileNotFoundError, sk.NotACheckpoint):
        with pytest.raises(error, match="no checkpoint is committed there"):
            dcp.FileSystemReader(tmp_path).read_metadata()


def test_paths_do_not_leave_the_folder(tmp_path):
    (tmp_path / "secret").write_bytes(b"x" * 100)
    folder = tmp_path / "checkpoint"
    stock.save({"a": torch.ones(2)}, checkpoint_id=folder)
    metadata = stock.FileSystemReader(folder).read_metadata()
    for place in metadata.storage_data.values():
        place.relative_path = "../secret"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(dcp.CheckpointException, match="leaves the checkpoint's folder"):
        dcp.load({"a": torch.zeros(2)}, checkpoint_id=folder, planner=OwnLoadPlanner())


class Casting(stock.DefaultSavePlanner):
    """A planner that stores all floats as bfloat16 without a change of its plans."""

    def resolve_data(self, write_item):
        data = super().resolve_data(write_item)
        return data.to(torch.bfloat16) if isinstance(data, torch.Tensor) else data


@pytest.mark.parametrize("reader", [stock, dcp])
def test_a_planner_that_casts_without_changing_its_plans(tmp_path, reader):
    dcp.save({"w": torch.arange(5.0)}, checkpoint_id=tmp_path, planner=Casting())
    assert str(sk.open(tmp_path).tensor("w").dtype) == "bfloat16"
    assert sk.open(tmp_path).verify().ok
    loaded = {"w": torch.zeros(5)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "w: stored as bfloat16, cast to float32")
        reader.load(loaded, checkpoint_id=tmp_path)
    assert loaded["w"].tolist() == [0, 1, 2, 3, 4]


def test_a_checkpoint_that_stock_wrote_with_casts_is_read_in_steps(tmp_path):
    stock.save({"w": torch.arange(5.0)}, checkpoint_id=tmp_path, planner=Casting())
    loaded = {"w": torch.zeros(5)}
    dcp.load(loaded, checkpoint_id=tmp_path, planner=OwnLoadPlanner())
    assert loaded["w"].tolist() == [0, 1, 2, 3, 4]


class OneBuffer(stock.DefaultLoadPlanner):
    """A planner that reads everything through the same memory, as planners for scarce memory do."""

    def set_up_planner(self, *args, **kwargs):
        super().set_up_planner(*args, **kwargs)
        self.buffer = torch.zeros(10_000)

    def resolve_tensor(self, read_item):
        size = int(torch.Size(read_item.lengths).numel())
        return self.buffer[:size].view(read_item.lengths)

    def commit_tensor(self, read_item, tensor):
        super().resolve_tensor(read_item).copy_(tensor)


@pytest.mark.parametrize("writer", [stock, dcp])
def test_a_planner_with_one_buffer_for_all(tmp_path, writer):
    saved = {name: values(name, (30, 20), torch.float32) for name in "abc"}
    writer.save(saved, checkpoint_id=tmp_path)
    loaded = blank(saved)
    dcp.load(loaded, checkpoint_id=tmp_path, planner=OneBuffer())
    assert equal(loaded, saved)


def test_a_subclass_that_calls_the_next_one(tmp_path):
    calls = []

    class Mine(dcp.FileSystemWriter):
        def write_data(self, plan, planner):
            calls.append(("write", len(plan.items)))
            return super().write_data(plan, planner)

        def finish(self, metadata, results):
            calls.append(("finish", len(results)))
            super().finish(metadata, results)

    class Reads(dcp.FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            calls.append("metadata")
            return super().read_metadata(*args, **kwargs)

        def read_data(self, plan, planner):
            calls.append(("read", len(plan.items)))
            return super().read_data(plan, planner)

    saved = {"a": torch.ones(3), "n": 1}
    dcp.save(saved, storage_writer=Mine(tmp_path))
    assert sk.open(tmp_path).kind == "shardkeep"
    loaded = blank(saved)
    dcp.load(loaded, storage_reader=Reads(tmp_path))
    assert equal(loaded, saved)
    assert calls == [("write", 2), ("finish", 1), "metadata", ("read", 2)]


def test_metadata_that_an_index_cannot_represent_is_kept(tmp_path):
    class Noting(dcp.DefaultSavePlanner):
        def create_global_plan(self, all_plans):
            plans, metadata = super().create_global_plan(all_plans)
            metadata.note = {"who": "me"}
            return plans, metadata

    dcp.save({"a": torch.ones(3), "n": 1}, checkpoint_id=tmp_path)
    dcp.save({"a": torch.ones(3), "n": 2}, checkpoint_id=tmp_path, planner=Noting())
    assert dcp.FileSystemReader(tmp_path).read_metadata().note == {"who": "me"}
    assert stock.FileSystemReader(tmp_path).read_metadata().note == {"who": "me"}
    for module in (dcp, stock):
        loaded = {"a": torch.zeros(3), "n": 0}
        module.load(loaded, checkpoint_id=tmp_path)
        assert equal(loaded, {"a": torch.ones(3), "n": 2})
    assert len(list(tmp_path.iterdir())) == 2, "what was overwritten is gone"
    assert b"strides" not in (tmp_path / ".metadata").read_bytes()


def test_only_the_needed_bytes_are_read(tmp_path, monkeypatch):
    from shardkeep.stores import LocalStore

    saved = {"w": values("w", (4096, 1024), torch.float32)}
    dcp.save(saved, checkpoint_id=tmp_path)
    read = []
    real = LocalStore.read_steps

    def counted(store, name, at, buffer, step, **more):
        read.append(len(buffer))
        return real(store, name, at, buffer, step, **more)

    monkeypatch.setattr(LocalStore, "read_steps", counted)
    reader = dcp.FileSystemReader(tmp_path)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    part = {"w": torch.zeros(8, 1024)}
    planner = dcp.DefaultLoadPlanner()
    planner.set_up_planner(part, metadata, True)
    index = MetadataIndex("w", (0, 0))
    shape = torch.Size((8, 1024))
    kind, here, there = stock_planner.LoadItemType.TENSOR, torch.Size((0, 0)), torch.Size((100, 0))
    item = stock_planner.ReadItem(kind, index, here, index, there, shape)
    reader.read_data(stock_planner.LoadPlan([item]), planner).wait()
    assert same(part["w"], saved["w"][100:108])
    assert 0 < sum(read) < 1 << 20


def test_metadata_of_ranks_that_saved_for_themselves(tmp_path):
    save(dcp, {"a": torch.ones(2), "n": 1}, tmp_path, "without collectives")
    reader = dcp.FileSystemReader(tmp_path)
    with pytest.raises(FileNotFoundError):
        reader.read_metadata()
    assert reader.read_metadata(rank=0).state_dict_metadata.keys() == {"a", "n"}
    merged = reader.read_metadata(rank=9)
    assert merged.state_dict_metadata.keys() == {"a", "n"}


def test_a_safetensors_file_contains_its_offsets(tmp_path):
    save(dcp, {"a": torch.ones(2, 3)}, tmp_path, "safetensors")
    (file,) = tmp_path.glob("*.distcp")
    data = file.read_bytes()
    about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert json.loads(about["DCP_SHARDING_INFO"]) == {"a": {"saved_offsets": [0, 0]}}
    assert about["format"] == "pt"


def test_stocks_own_file_system_is_read_by_the_engine(tmp_path):
    writer = stock_files.FileSystemWriter(tmp_path)
    dcp.save({"a": torch.ones(2)}, storage_writer=writer)
    assert sk.open(tmp_path).kind == "shardkeep"
