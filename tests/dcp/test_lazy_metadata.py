"""The metadata that a save returns is built on its first use, and is then torch's own."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import shutil
import subprocess
import sys
import threading

import pytest

torch = pytest.importorskip("torch")

import torch.distributed.checkpoint as stock

import shardkeep.dcp as dcp
from shardkeep.dcp.bridge import lazy_metadata
from shardkeep.dcp.bridge.lazy_metadata import pending_build
from shardkeep.dcp.state_dict_saver import AsyncCheckpointerType

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:.*torch.distributed is"),
]


def state():
    return {"model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0)}, "step": 7}


@pytest.fixture
def metadata(tmp_path):
    saved = dcp.save(state(), checkpoint_id=tmp_path)
    assert pending_build(saved) is not None
    return saved


USES = {
    "attribute": lambda metadata: metadata.state_dict_metadata,
    "attribute with a default": lambda metadata: metadata.planner_data,
    "method": lambda metadata: metadata.__reduce_ex__(4),
    "equality": lambda metadata: metadata == dcp.Metadata({}),
    "repr": repr,
    "vars": vars,
    "dir": dir,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "python's pickle": pickle._dumps,
    "replace": lambda metadata: dataclasses.replace(metadata, planner_data=None),
    "set": lambda metadata: setattr(metadata, "storage_meta", None),
    "delete": lambda metadata: delattr(metadata, "storage_meta"),
}


@pytest.mark.parametrize("use", USES)
def test_any_use_makes_it_an_instance_of_torchs_own_class(metadata, tmp_path, use):
    before = dcp.FileSystemReader(tmp_path).read_metadata()
    USES[use](metadata)
    assert type(metadata) is dcp.Metadata is stock.Metadata
    assert pending_build(metadata) is None
    assert metadata.state_dict_metadata == before.state_dict_metadata
    assert metadata.planner_data == before.planner_data
    assert metadata.storage_data == before.storage_data
    if use == "set":
        assert metadata.storage_meta is None
    assert set(vars(metadata)) <= {field.name for field in dataclasses.fields(stock.Metadata)}


def test_asking_for_the_class_builds_nothing(metadata):
    assert isinstance(metadata, dcp.Metadata)
    assert metadata.__class__ is dcp.Metadata
    assert not isinstance(metadata, stock.StorageReader)
    assert dataclasses.is_dataclass(metadata)
    assert pending_build(metadata) is not None


def test_copies_and_pickles_equal_the_original(metadata):
    for made in (pickle.loads(pickle.dumps(metadata)), copy.deepcopy(metadata)):
        assert made == metadata
        assert type(made) is dcp.Metadata
    assert dataclasses.replace(metadata) == metadata


def test_unused_metadata_can_be_compared(tmp_path):
    first = dcp.save(state(), checkpoint_id=tmp_path / "a")
    second = dcp.save(state(), checkpoint_id=tmp_path / "b")
    assert first != second  # their ids differ
    second.storage_meta, second.storage_data = first.storage_meta, first.storage_data
    assert first == second


def test_a_pickle_is_loaded_by_torch_alone(metadata, tmp_path):
    file = tmp_path / "pickled"
    file.write_bytes(pickle.dumps(metadata))
    code = """
import pickle, sys
metadata = pickle.load(open(sys.argv[1], "rb"))
assert not any(name.startswith("shardkeep") for name in sys.modules)
print(type(metadata).__module__, sorted(metadata.state_dict_metadata))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, file], check=False, capture_output=True, text=True
    )
    said = "torch.distributed.checkpoint.metadata ['model.b', 'model.w', 'step']\n"
    assert done.stdout == said, done.stderr


def test_it_can_be_used_when_the_checkpoint_was_replaced_or_removed(metadata, tmp_path):
    dcp.save({"other": torch.ones(1)}, checkpoint_id=tmp_path)
    removed = dcp.save({"third": torch.ones(1)}, checkpoint_id=tmp_path / "third")
    shutil.rmtree(tmp_path)
    assert set(metadata.state_dict_metadata) == {"model.w", "model.b", "step"}
    assert set(removed.state_dict_metadata) == {"third"}


def test_storage_meta_has_the_path_and_the_save_id(tmp_path):
    writer = dcp.FileSystemWriter(tmp_path)
    metadata = dcp.save(state(), storage_writer=writer)
    assert metadata.storage_meta == stock.metadata.StorageMeta(writer.path, writer.save_id)


def test_threads_that_use_it_at_once_see_one_object(metadata):
    build = pending_build(metadata)
    together = threading.Barrier(4)

    def build_late():
        together.wait()  # nothing is built when the four threads start
        return build()

    lazy = lazy_metadata.lazy_metadata(build_late)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(lazy.state_dict_metadata)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(one is lazy.state_dict_metadata for one in found)


def test_a_build_that_fails_can_be_tried_again(metadata):
    build, errors = pending_build(metadata), [MemoryError("no memory")]

    def once():
        if errors:
            raise errors.pop()
        return build()

    lazy = lazy_metadata.lazy_metadata(once)
    with pytest.raises(MemoryError, match="no memory"):
        len(lazy.state_dict_metadata)
    assert lazy == metadata


@pytest.mark.parametrize("kind", list(AsyncCheckpointerType))
def test_no_save_builds_it(tmp_path, kind):
    done = dcp.async_save(state(), checkpoint_id=tmp_path, async_checkpointer_type=kind)
    saved = done.result()
    assert pending_build(saved) is not None  # nor in the other process
    assert saved == dataclasses.replace(
        dcp.FileSystemReader(tmp_path).read_metadata(), storage_meta=saved.storage_meta
    )
