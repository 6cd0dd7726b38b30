"""The promises of torch's own compatibility tests for checkpoints hold."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import torch.distributed.checkpoint as stock
from compat.expected import compare, known_here, template
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as LegacyProperties
from torch.distributed.checkpoint import _version, planner_helpers

import shardkeep as sk
import shardkeep.dcp as dcp
from support.scenarios import blank, equal, values

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:.*torch.distributed is"),
]
GOLDEN = Path(__file__).parent.parent / "golden"
OLD_FIELDS = {
    "ChunkStorageMetadata": "offsets sizes",
    "TensorProperties": "dtype layout requires_grad memory_format pin_memory",
    "TensorStorageMetadata": "properties size chunks",
    "BytesStorageMetadata": "",
    "Metadata": "state_dict_metadata planner_data storage_data",
    "MetadataIndex": "fqn offset index",
    "StorageMeta": "checkpoint_id save_id load_id",
    "SavePlan": "items storage_data planner_data",
    "LoadPlan": "items storage_data planner_data",
    "WriteItem": "index type bytes_io_data tensor_data",
    "ReadItem": "type dest_index dest_offsets storage_index storage_offsets lengths",
    "TensorWriteData": "chunk properties size",
    "WriteResult": "index size_in_bytes storage_data",
    "_StorageInfo": "relative_path offset length",
}


class OwnSavePlanner(dcp.DefaultSavePlanner):
    def create_local_plan(self):
        return super().create_local_plan()


class OwnLoadPlanner(dcp.DefaultLoadPlanner):
    def create_local_plan(self):
        return super().create_local_plan()


class StockLoadPlanner(stock.DefaultLoadPlanner):
    def create_local_plan(self):
        return super().create_local_plan()


LOADING = [None, OwnLoadPlanner, StockLoadPlanner]
HOW = ["native", "by steps", "by torch's steps"]


@pytest.mark.parametrize("name", list(OLD_FIELDS))
def test_metadata_classes_can_be_built_with_the_fields_of_old_releases(name):
    places = (dcp.metadata, dcp.planner, dcp.storage, dcp.filesystem)
    kind = next(getattr(place, name) for place in places if hasattr(place, name))
    old = OLD_FIELDS[name].split()
    for field in dataclasses.fields(kind):
        has_default = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        assert field.name in old or has_default, field.name
    kind(**dict.fromkeys(old))


@pytest.mark.parametrize("planner", LOADING, ids=HOW)
def test_legacy_tensor_properties_load(tmp_path, monkeypatch, planner):
    saved = {"a": values("a", (4, 4), torch.float32), "n": {"i": 1}}
    monkeypatch.setattr(planner_helpers, "TensorProperties", LegacyProperties)
    stock.save(saved, checkpoint_id=tmp_path)
    monkeypatch.undo()
    properties = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata["a"].properties
    theirs = stock.FileSystemReader(tmp_path).read_metadata().state_dict_metadata["a"].properties
    assert type(theirs) is LegacyProperties
    assert (properties.dtype, properties.layout) == (torch.float32, torch.strided)
    assert (properties.requires_grad, properties.pin_memory) == (False, False)
    loaded = blank(saved)
    dcp.load(loaded, checkpoint_id=tmp_path, planner=planner and planner())
    assert equal(loaded, saved)


@pytest.mark.parametrize("planner", [None, OwnSavePlanner], ids=HOW[:2])
@pytest.mark.parametrize("module", [stock, dcp], ids=["stock", "ours"])
def test_storage_meta_names_checkpoint_save_and_load(tmp_path, module, planner):
    writer = module.FileSystemWriter(tmp_path)
    first = writer.save_id
    dcp.save({"a": torch.ones(2)}, storage_writer=writer, planner=planner and planner())
    reader = dcp.FileSystemReader(tmp_path)
    meta = reader.read_metadata().storage_meta
    assert str(meta.checkpoint_id) == str(tmp_path)
    assert meta.save_id == writer.save_id
    assert meta.load_id == reader.load_id
    dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path, storage_writer=writer)
    again = dcp.FileSystemReader(tmp_path).read_metadata().storage_meta
    assert again.save_id == writer.save_id
    assert again.save_id != meta.save_id
    assert first


def test_storage_meta_of_a_checkpoint_of_stock_torch(tmp_path):
    writer = stock.FileSystemWriter(tmp_path)
    stock.save({"a": torch.ones(2)}, storage_writer=writer)
    reader = dcp.FileSystemReader(tmp_path)
    meta = reader.read_metadata().storage_meta
    assert (str(meta.checkpoint_id), meta.save_id) == (str(tmp_path), writer.save_id)
    assert meta.load_id == reader.load_id


def nested() -> dict:
    return {
        "model": {"w": values("w", (3, 4), torch.float32), "b": {"c": torch.arange(3)}},
        "optim": {
            "state": {"w": {"step": torch.tensor(2.0)}},
            "param_groups": [{"lr": 0.5, "betas": (0.9, 0.99), "params": ["w"]}],
        },
        "no_tensors": {"epoch": 3, "deep": {"name": "x"}},
        "step": 7,
    }


@pytest.mark.parametrize("planner", LOADING, ids=HOW)
@pytest.mark.parametrize("saver", ["stock", "ours", "our steps"])
def test_checkpoints_saved_as_by_2_3_load_into_nested_states(tmp_path, monkeypatch, saver, planner):
    saved = nested()
    monkeypatch.setattr(_version, "_derived_version", "2_3")
    more = {"planner": OwnSavePlanner()} if saver == "our steps" else {}
    (stock if saver == "stock" else dcp).save(saved, checkpoint_id=tmp_path, **more)
    monkeypatch.undo()
    if saver != "ours":
        assert "no_tensors" in sk.open(tmp_path)  # one object, as 2.3 stored it
        assert "no_tensors.epoch" not in sk.open(tmp_path)
    loaded = blank(saved)
    dcp.load(loaded, checkpoint_id=tmp_path, planner=planner and planner())
    assert equal(loaded, saved)


@pytest.mark.parametrize("planner", LOADING[:2], ids=HOW[:2])
def test_checkpoints_of_2_3_load_into_nested_states(tmp_path, planner):
    with tarfile.open(GOLDEN / "2.3.1.tar.xz") as archive:
        archive.extractall(tmp_path)
    done = 0
    for case in ("nested", "optimizer", "dtypes", "shapes", "views", "tied"):
        (file,) = tmp_path.glob(f"**/{case}/expected.json")
        expected = known_here(json.loads(file.read_text()))
        state = template(expected)
        make = planner or dcp.DefaultLoadPlanner
        chosen = make(allow_partial_load=True)
        dcp.load(state, checkpoint_id=file.parent / "ckpt", planner=chosen)
        found = compare(expected, state, typed_keys=True)
        assert found.differences == ()
        done += found.leaves
    assert done > 50
