"""Scenarios in which stock torch fails and Shardkeep does not, run with both.

The half about stock torch records what a release does, so that a fix in a release is noticed.
"""

from __future__ import annotations

import os
import pickle
import stat
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

import shardkeep as sk
import shardkeep.dcp as dcp
from support import dcp_defects
from support.scenarios import equal
from support.waiting import PROMPT_SECONDS

RELEASE = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
SEEN = RELEASE == (2, 13)
stocks = pytest.mark.skipif(not SEEN, reason="seen with torch 2.13; look whether this one does")
BOTH = [pytest.param(stock, id="stock", marks=stocks), pytest.param(dcp, id="ours")]
NAMES = [pytest.param("stock", id="stock", marks=stocks), pytest.param("ours", id="ours")]
pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:.*torch.distributed is"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]


# 1 -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("base", BOTH)
@pytest.mark.parametrize("steps", [False, True], ids=["native", "by steps"])
def test_a_failed_writer_thread_fails_the_save(tmp_path, base, steps):
    writer = base.FileSystemWriter(tmp_path, thread_count=2)
    writer.fs = dcp_defects.FullDisk(in_threads=base is stock)
    planner = Overriding() if steps else None
    state = {name: torch.ones(100) for name in "abcd"}
    if base is stock:
        base.save(state, storage_writer=writer, planner=planner)
        assert (tmp_path / ".metadata").exists()
        with pytest.raises(stock.CheckpointException):
            stock.load({name: torch.zeros(100) for name in "abcd"}, checkpoint_id=tmp_path)
        return
    with pytest.raises(dcp.CheckpointException, match="No space left on device") as caught:
        base.save(state, storage_writer=writer, planner=planner)
    assert isinstance(caught.value, OSError)
    assert not (tmp_path / ".metadata").exists()


class Overriding(stock.DefaultSavePlanner):
    def create_local_plan(self):
        return super().create_local_plan()


# 2 -----------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


@pytest.mark.parametrize("base", BOTH)
@pytest.mark.parametrize("how", ["load", "read_metadata", "by steps"])
def test_metadata_executes_no_code(tmp_path, base, how):
    base.save({"a": torch.ones(2)}, checkpoint_id=tmp_path)
    metadata = stock.FileSystemReader(tmp_path).read_metadata()
    metadata.planner_data = {"a": Evil(tmp_path / "ran")}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    planner = type("Own", (base.DefaultLoadPlanner,), {"finish_plan": lambda self, plan: plan})

    def read() -> None:
        if how == "read_metadata":
            base.FileSystemReader(tmp_path).read_metadata()
        else:
            more = {"planner": planner()} if how == "by steps" else {}
            base.load({"a": torch.zeros(2)}, checkpoint_id=tmp_path, **more)

    if base is stock:
        read()
        assert (tmp_path / "ran").exists()
        return
    # Otherwise the tensor is loaded, and the hostile part stays inert.
    with suppress(dcp.CheckpointException, sk.errors.ShardkeepError):
        read()
    assert not (tmp_path / "ran").exists()


# 3 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BOTH)
def test_a_save_that_cannot_commit_leaves_the_old_checkpoint(tmp_path, base):
    base.save({"a": torch.ones(2)}, checkpoint_id=tmp_path)
    writer = base.FileSystemWriter(tmp_path)
    writer.fs = dcp_defects.NoRename()
    with pytest.raises(dcp.CheckpointException, match="Input/output error"):
        base.save({"a": torch.zeros(2)}, storage_writer=writer)
    loaded = {"a": torch.full((2,), 5.0)}
    if base is stock:
        assert not (tmp_path / ".metadata").exists()
        return
    base.load(loaded, checkpoint_id=tmp_path)
    assert loaded["a"].tolist() == [1, 1]


class Failing(stock.DefaultSavePlanner):
    """A planner that fails at the second item."""

    calls = 0

    def resolve_data(self, write_item):
        self.calls += 1
        if self.calls > 1:
            raise OSError("no")
        return super().resolve_data(write_item)


@pytest.mark.parametrize("base", BOTH)
def test_overwriting_keeps_the_old_files_until_the_commit(tmp_path, base):
    state = {"a": torch.ones(50), "b": torch.ones(60)}
    base.save(state, checkpoint_id=tmp_path)
    with pytest.raises(dcp.CheckpointException, match="no"):
        changed = {"a": torch.full((50,), 3.0), "b": torch.zeros(60)}
        base.save(changed, checkpoint_id=tmp_path, planner=Failing())
    loaded = {"a": torch.zeros(50), "b": torch.zeros(60)}
    if base is dcp:
        base.load(loaded, checkpoint_id=tmp_path)
        assert equal(loaded, state)
        return
    with pytest.raises(stock.CheckpointException):
        base.load(loaded, checkpoint_id=tmp_path)


@pytest.mark.parametrize("base", NAMES)
def test_no_files_of_an_earlier_save_remain(gloo, tmp_path, base):
    gloo.run(dcp_defects.stale_files, base, str(tmp_path), size=4)
    files = {file.name for file in tmp_path.glob("*.distcp")}
    used = {
        place.relative_path
        for place in stock.FileSystemReader(tmp_path).read_metadata().storage_data.values()
    }
    assert (files == used) == (base == "ours")


@pytest.mark.skipif(sys.platform == "win32", reason="folders can't be synced")
@pytest.mark.parametrize("base", BOTH)
@pytest.mark.parametrize("steps", [False, True], ids=["native", "by steps"])
def test_the_folder_is_synced(tmp_path, monkeypatch, base, steps):
    synced = []
    fsync = os.fsync

    def noting(file) -> None:
        number = file if isinstance(file, int) else file.fileno()
        synced.append(stat.S_ISDIR(os.fstat(number).st_mode))
        fsync(file)

    monkeypatch.setattr(os, "fsync", noting)
    base.save({"a": torch.ones(2)}, checkpoint_id=tmp_path, planner=Overriding() if steps else None)
    assert any(synced) == (base is dcp)


# 4 -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="nothing counts what is read")
@pytest.mark.parametrize("base", NAMES)
def test_a_rank_reads_only_its_rows(gloo, tmp_path, base):
    whole = torch.arange(2048 * 1024, dtype=torch.float32).view(2048, 1024)
    stock.save({"w": whole}, checkpoint_id=tmp_path / "stock")
    dcp.save({"w": whole}, checkpoint_id=tmp_path / "ours")
    read = gloo.run(dcp_defects.bytes_read, base, str(tmp_path / base), size=4)
    share = whole.nbytes // 4
    if base == "stock":
        assert min(read) >= whole.nbytes
    else:
        assert max(read) < 1.5 * share


# 5 -----------------------------------------------------------------------------------------------


def item(name: str, held: int, whole: int) -> WriteItem:
    data = TensorWriteData(
        ChunkStorageMetadata(torch.Size([0]), torch.Size([held])),
        TensorProperties(dtype=torch.float32),
        torch.Size([whole]),
    )
    return WriteItem(MetadataIndex(name, torch.Size([0])), WriteItemType.SHARD, tensor_data=data)


ITEMS = [item("shard", 1, 1_000_000), *(item(f"whole{i}", 100, 100) for i in range(4))]


@pytest.mark.parametrize("base", BOTH)
def test_replicas_are_distributed_by_written_bytes(base):
    plans = [SavePlan(list(ITEMS), planner_data={}) for _ in range(2)]
    plans, _ = base.DefaultSavePlanner(flatten_state_dict=False)._dedup_save_plans(plans), None
    loads = sorted(sum(i.tensor_data.chunk.sizes[0] for i in plan.items) for plan in plans)
    assert loads == ([1, 400] if base is stock else [200, 201])


@pytest.mark.parametrize("base", BOTH)
def test_files_are_balanced_by_written_bytes(tmp_path, base):
    class Planner(base.DefaultSavePlanner):
        def resolve_data(self, write_item):
            return torch.zeros(write_item.tensor_data.chunk.sizes)

    writer = base.FileSystemWriter(tmp_path, thread_count=2)
    writer.set_up_storage_writer(True)
    (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(SavePlan(list(ITEMS)))])
    results = writer.write_data(plan, Planner()).wait()
    release_lease(writer, base, tmp_path)
    held = {one.index.fqn: one.tensor_data.chunk.sizes[0] for one in ITEMS}
    loads: dict[str, int] = {}
    for result in results:
        file = result.storage_data.relative_path
        loads[file] = loads.get(file, 0) + held[result.index.fqn]
    assert sorted(loads.values()) == ([1, 400] if base is stock else [200, 201])


# 6 -----------------------------------------------------------------------------------------------


def release_lease(writer, base, folder: Path) -> None:
    """End an unfinished save: until then, Shardkeep's writer keeps a lease file."""
    leases = [file.name for file in folder.iterdir() if file.name.startswith(".")]
    assert len(leases) == (0 if base is stock else 1)
    if base is dcp:
        writer.release_lease()
    assert {file.suffix for file in folder.iterdir()} <= {".distcp", ".safetensors"}


def two_shards() -> SavePlan:
    items = []
    for start in (0, 2):
        chunk = ChunkStorageMetadata(torch.Size([start]), torch.Size([2]))
        data = TensorWriteData(chunk, TensorProperties(dtype=torch.float32), torch.Size([4]))
        index = MetadataIndex("w", chunk.offsets)
        items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
    return SavePlan(items)


@pytest.mark.skipif(RELEASE < (2, 9), reason="this release can't write safetensors")
@pytest.mark.parametrize("base", BOTH)
def test_two_shards_of_a_tensor_both_reach_safetensors(tmp_path, base):
    safetensors = pytest.importorskip("safetensors.torch")

    class Planner(base.DefaultSavePlanner):
        def resolve_data(self, write_item):
            start = write_item.index.offset[0]
            return torch.arange(start, start + 2, dtype=torch.float32)

    form = base.filesystem.SerializationFormat.SAFETENSORS
    writer = base.FileSystemWriter(tmp_path, serialization_format=form)
    writer.set_up_storage_writer(True)
    (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(two_shards())])
    writer.write_data(plan, Planner()).wait()
    release_lease(writer, base, tmp_path)
    kept = [
        number
        for file in tmp_path.iterdir()
        for tensor in safetensors.load_file(file).values()
        for number in tensor.tolist()
    ]
    assert sorted(kept) == ([2, 3] if base is stock else [0, 1, 2, 3])


@pytest.mark.skipif(RELEASE < (2, 9), reason="this release can't consolidate")
@pytest.mark.parametrize("base", BOTH)
def test_integers_are_consolidated(tmp_path, base):
    safetensors = pytest.importorskip("safetensors.torch")
    number = torch.arange(8).view(4, 2)
    more = {"save_distributed": True, "enable_consolidation": True}
    writer = base.HuggingFaceStorageWriter(str(tmp_path), **more)
    if base is stock:
        with pytest.raises(BaseException, match=r"finfo|floating"):
            base.save({"n": number}, storage_writer=writer)
        return
    base.save({"n": number}, storage_writer=writer)
    found = [safetensors.load_file(file) for file in tmp_path.glob("model*.safetensors")]
    assert [equal(one["n"], number) for one in found] == [True]


# 7 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BOTH)
def test_nested_objects_are_loaded_unflattened(tmp_path, base):
    saved = {"w": torch.ones(2), "epoch": {"number": 3, "list": [1, 2]}}
    base.save(saved, checkpoint_id=tmp_path, planner=base.DefaultSavePlanner(False))
    loaded = {"w": torch.zeros(2), "epoch": {"number": 0, "list": [0, 0]}}
    base.load(loaded, checkpoint_id=tmp_path, planner=base.DefaultLoadPlanner(False))
    assert loaded["w"].tolist() == [1, 1]
    old = {"number": 0, "list": [0, 0]}
    assert loaded["epoch"] == (old if base is stock else saved["epoch"])


# 8 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BOTH)
@pytest.mark.parametrize("steps", [False, True], ids=["native", "by steps"])
def test_objects_keep_their_integer_keys(tmp_path, base, steps):
    base.save({"per": {0: {"a": 1}, 7: "x"}}, checkpoint_id=tmp_path)
    own = type("Own", (base.DefaultLoadPlanner,), {"finish_plan": lambda self, plan: plan})
    loaded = {"per": {0: {"a": 0}, 7: ""}}
    base.load(loaded, checkpoint_id=tmp_path, planner=own() if steps else None)
    beside = {"per": {0: {"a": 0}, 7: "", "0": {"a": 1}, "7": "x"}}
    assert loaded == (beside if base is stock else {"per": {0: {"a": 1}, 7: "x"}})


# 9 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BOTH)
def test_another_dtype_is_not_cast_silently(tmp_path, base):
    base.save({"w": torch.tensor([1 / 3, 1e10])}, checkpoint_id=tmp_path)
    loaded = {"w": torch.zeros(2, dtype=torch.float16)}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        base.load(loaded, checkpoint_id=tmp_path)
    said = [str(one.message) for one in told if "float" in str(one.message)]
    assert said == ([] if base is stock else ["w: stored as float32, cast to float16"])
    assert loaded["w"][1] == float("inf")


# 10 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [pytest.param(stock, id="stock"), pytest.param(dcp, id="ours")])
def test_plain_values_are_loaded(tmp_path, base):
    """Torch 2.3, which is older than Shardkeep supports, kept the caller's values."""
    base.save({"lr": 0.5, "name": "x", "deep": {"n": 3}}, checkpoint_id=tmp_path)
    loaded = {"lr": 0.0, "name": "", "deep": {"n": 0}}
    base.load(loaded, checkpoint_id=tmp_path)
    assert (loaded["lr"] == 0.5) == (base is dcp or RELEASE > (2, 3))
    assert base is stock or loaded == {"lr": 0.5, "name": "x", "deep": {"n": 3}}


# 11 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "steps"),
    [
        pytest.param("stock", False, id="stock", marks=stocks),
        pytest.param("ours", False, id="native"),
        pytest.param("ours", True, id="by steps"),
    ],
)
def test_all_ranks_raise_the_cause_of_one_ranks_failure_at_once(gloo, tmp_path, base, steps):
    ends = gloo.run(dcp_defects.lost_cause, base, str(tmp_path), steps, size=4)
    for rank, (said, took) in enumerate(ends):
        if rank == 1 or base == "ours":
            assert "the loader's state is gone" in said
            assert took < PROMPT_SECONDS
        else:  # The rank waits until the group's timeout, and does not learn the cause.
            assert "the loader's state is gone" not in said
    if base == "stock":
        assert max(took for _, took in ends) > 2.5
