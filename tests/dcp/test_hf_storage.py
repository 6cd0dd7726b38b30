"""Hugging Face storage reads and writes safetensors files on one rank and on several."""

from __future__ import annotations

import inspect
import json
import struct
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint.metadata import MetadataIndex

import shardkeep as sk
import shardkeep.dcp as dcp
from shardkeep.stores.local.store import LocalPositionedWriter, LocalStore
from support import dcp_hf
from support.dcp_hf import Parts, dtypes
from support.scenarios import same, values

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = [pytestmark, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

Reader, Writer = dcp.HuggingFaceStorageReader, dcp.HuggingFaceStorageWriter
needs_stock = pytest.mark.skipif(
    not hasattr(stock, "HuggingFaceStorageReader"), reason="this torch has none"
)


def state(*modules) -> dict:
    """Return a state that all of the given modules can write and read."""
    kinds = dtypes(like_stock=stock in modules)
    made = {
        f"{dtype}".replace("torch.", "a."): values(f"{dtype}", (4, 3), dtype) for dtype in kinds
    }
    if stock not in modules:  # Stock torch refuses tensors that are not contiguous.
        made["turned"] = values("t", (5, 2), torch.bfloat16).t()
    return {
        **made,
        "scalar": torch.tensor(3, dtype=torch.int16),
        "none": torch.zeros(0, 2),
        "nested": {"list": [torch.ones(2)]},
        "p": torch.nn.Parameter(torch.full((2,), 2.0)),
    }


def flat(made: dict) -> dict:
    plain = {name: value for name, value in made.items() if name != "nested"}
    return {**plain, "nested.list.0": made["nested"]["list"][0]}


def zeros(made: dict) -> dict:
    loaded = {n: torch.zeros(v.shape, dtype=v.dtype) for n, v in made.items() if n != "nested"}
    return {**loaded, "nested": {"list": [torch.zeros(2)]}}


def check(loaded: dict, saved: dict) -> None:
    assert set(loaded) == set(saved)
    assert [name for name in saved if not same(loaded[name], saved[name])] == []


@needs_stock
@pytest.mark.parametrize(
    "name",
    ["HuggingFaceStorageReader", "HuggingFaceStorageWriter", "QuantizedHuggingFaceStorageReader"],
)
def test_signatures_are_torchs(name):
    theirs, ours = (inspect.signature(getattr(module, name)) for module in (stock, dcp))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


PATHS = [(stock, dcp), (dcp, stock), (dcp, dcp)]


@needs_stock
@pytest.mark.parametrize(("writer", "reader"), PATHS, ids=["to us", "from us", "both"])
@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("files", [1, 3])
def test_save_and_load(tmp_path, writer, reader, distributed, files):
    saved = state(writer, reader)
    mapping = {name: 1 + n % files for n, name in enumerate(flat(saved))} if files > 1 else None
    storage = writer.HuggingFaceStorageWriter(str(tmp_path), mapping, save_distributed=distributed)
    writer.save(saved, storage_writer=storage)
    loaded = zeros(saved)
    reader.load(loaded, storage_reader=reader.HuggingFaceStorageReader(str(tmp_path), 2))
    check(flat(loaded), flat(saved))
    names = [f"model-{n:05}-of-{files:05}.safetensors" for n in range(1, files + 1)]
    expected = [f"shard-00001-{n}" for n in names] if distributed else names
    if not distributed:
        expected.append("model.safetensors.index.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(expected)
    opened = sk.open(tmp_path)
    assert opened.kind == "safetensors"
    assert opened.read("scalar") == 3


@pytest.mark.parametrize("files", [1, 3])
def test_safetensors_own_loader_reads_what_is_written(tmp_path, files):
    saved = flat(state())
    mapping = {name: 1 + n % files for n, name in enumerate(saved)}
    dcp.save(saved, storage_writer=Writer(tmp_path, mapping))
    loaded = {}
    for file in tmp_path.glob("*.safetensors"):
        loaded |= safetensors.load_file(file)
    check(loaded, saved)
    listing = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert listing["weight_map"] == {n: f"model-{i:05}-of-{files:05}.safetensors"
                                     for n, i in mapping.items()}  # fmt: skip
    assert listing["metadata"]["total_size"] == sum(value.nbytes for value in saved.values())


def test_files_of_the_reference_are_loaded(tmp_path):
    saved = {name: value.detach().clone().contiguous() for name, value in flat(state()).items()}
    safetensors.save_file(saved, tmp_path / "anything.safetensors")
    loaded = {name: torch.zeros(v.shape, dtype=v.dtype) for name, v in saved.items()}
    dcp.load(loaded, storage_reader=Reader(tmp_path))
    check(loaded, saved)


@needs_stock
def test_metadata_equals_that_of_stocks_reader(tmp_path):
    saved = {"w": torch.ones(4, 3), "b": torch.arange(3)}
    dcp.save(saved, storage_writer=Writer(tmp_path, save_distributed=True))
    ours = Reader(str(tmp_path)).read_metadata()
    theirs = stock.HuggingFaceStorageReader(str(tmp_path)).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert ours.storage_meta.load_id


BOXES = {
    "rows": [((0, 0), (2, 4)), ((2, 0), (3, 4))],
    "apart": [((0, 0), (2, 2)), ((0, 2), (5, 2)), ((2, 0), (3, 2))],
}


def with_parts() -> dict:
    return {name: values(name, (5, 4), torch.int32) for name in BOXES}


def in_parts() -> dict:
    return {name: Parts.of(whole, BOXES[name]) for name, whole in with_parts().items()}


def test_several_parts_of_a_tensor_in_one_process(tmp_path):
    writer = Writer(tmp_path, save_distributed=True, enable_consolidation=True)
    dcp.save(in_parts(), storage_writer=writer)
    sharded = tmp_path / "sharded"
    assert sorted(p.name for p in sharded.iterdir()) == [
        "shard-00001-model-00001-of-00001-part-00002.safetensors",
        "shard-00001-model-00001-of-00001-part-00003.safetensors",
        "shard-00001-model-00001-of-00001.safetensors",
    ]
    modules = [dcp, stock] if hasattr(stock, "HuggingFaceStorageReader") else [dcp]
    for module in modules:
        for folder in (sharded, tmp_path):
            loaded = {name: torch.zeros_like(value) for name, value in with_parts().items()}
            module.load(loaded, storage_reader=module.HuggingFaceStorageReader(str(folder)))
            check(loaded, with_parts())
    check(safetensors.load_file(tmp_path / "model-00001-of-00001.safetensors"), with_parts())


@needs_stock
def test_stock_torch_loses_parts(tmp_path):
    """This is why the parts of a tensor are written to separate files."""
    storage = stock.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
    stock.save(in_parts(), storage_writer=storage)
    assert (
        sum(p.stat().st_size for p in tmp_path.iterdir())
        < sum(value.nbytes for value in with_parts().values()) + 500
    )
    loaded = {name: torch.zeros_like(value) for name, value in with_parts().items()}
    with pytest.raises(dcp.CheckpointException):
        dcp.load(loaded, storage_reader=Reader(tmp_path))


def test_values_other_than_tensors_are_named(tmp_path):
    with pytest.raises(sk.Conflict, match="can hold only tensors, not epoch, list: "):
        dcp.save({"w": torch.ones(1), "epoch": 3, "list": [1]}, storage_writer=Writer(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_values_that_safetensors_cannot_hold_are_named(tmp_path):
    wide = {"w": torch.ones(2, dtype=torch.complex128)}
    with pytest.raises(sk.Conflict, match=r"tensor 'w': safetensors files can't hold complex128"):
        dcp.save(wide, storage_writer=Writer(tmp_path))
    with pytest.raises(sk.Conflict, match="fqn_to_index_mapping has no entry for tensor 'w'"):
        dcp.save({"w": torch.ones(2)}, storage_writer=Writer(tmp_path, {"v": 1}))
    with pytest.raises(sk.Conflict, match="tensor 'rows' is sharded: pass save_distributed=True"):
        dcp.save(in_parts(), storage_writer=Writer(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch):
    def save(number: float) -> None:
        dcp.save({"w": torch.full((1000,), number)}, storage_writer=Writer(tmp_path))

    save(1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(self, offset, parts) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(LocalPositionedWriter, "write_at", full)
        with pytest.raises(OSError, match="No space left"):
            save(2)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    save(3)
    assert sk.open(tmp_path).read("w")[0] == 3


def test_files_of_an_earlier_save_are_removed(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "other.safetensors").write_bytes(safetensors.save({"other": torch.ones(1)}))
    state = {name: torch.ones(2) for name in "abc"}
    dcp.save(state, storage_writer=Writer(tmp_path, {"a": 1, "b": 2, "c": 3}))
    dcp.save(state, storage_writer=Writer(tmp_path, {"a": 1, "b": 2, "c": 2}))
    assert len(list(tmp_path.iterdir())) == 5
    dcp.save(state, storage_writer=Writer(tmp_path, save_distributed=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "other.safetensors", "shard-00001-model-00001-of-00001.safetensors",
    ]  # fmt: skip
    assert set(sk.open(tmp_path)) == {"a", "b", "c", "other"}


def test_another_place_is_given_with_the_call(tmp_path):
    writer = Writer(tmp_path / "never", save_distributed=True, enable_consolidation=True)
    dcp.save({"w": torch.arange(3)}, checkpoint_id=str(tmp_path / "here"), storage_writer=writer)
    assert not (tmp_path / "never").exists()
    loaded = {"w": torch.zeros(3, dtype=torch.int64)}
    dcp.load(loaded, checkpoint_id=tmp_path / "here", storage_reader=Reader(tmp_path / "never"))
    assert loaded["w"].tolist() == [0, 1, 2]


def test_a_url(tmp_path):
    url = f"memory://{tmp_path.name}"
    saved = {"w": values("w", (40, 3), torch.float32), "b": torch.arange(3)}
    writer = Writer(url, save_distributed=True, enable_consolidation=True)
    dcp.save(saved, storage_writer=writer)
    for folder in (url, f"{url}/sharded"):
        loaded = {name: torch.zeros_like(value) for name, value in saved.items()}
        dcp.load(loaded, storage_reader=Reader(folder))
        check(loaded, saved)


def test_other_dtypes_are_cast_with_one_warning(tmp_path):
    saved = {f"w{n}": torch.arange(3, dtype=torch.bfloat16) for n in range(7)}
    dcp.save(saved, storage_writer=Writer(tmp_path))
    loaded = {name: torch.zeros(3) for name in saved}
    with pytest.warns(UserWarning, match="^w0: stored as bfloat16, cast to float32; .*and 2 more$"):
        dcp.load(loaded, storage_reader=Reader(tmp_path))
    assert all(value.tolist() == [0, 1, 2] for value in loaded.values())


def test_part_of_a_set_of_files_can_be_loaded(tmp_path):
    saved = {name: torch.full((2,), float(n)) for n, name in enumerate("abc")}
    dcp.save(saved, storage_writer=Writer(tmp_path, {"a": 1, "b": 2, "c": 3}))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    loaded = {"a": torch.ones(2), "c": torch.ones(2)}
    dcp.load(loaded, storage_reader=Reader(tmp_path))
    assert loaded["c"].tolist() == [2, 2]
    with pytest.raises(dcp.CheckpointException, match="b"):
        dcp.load({"b": torch.ones(2)}, storage_reader=Reader(tmp_path))


def test_the_index_selects_one_of_two_files(tmp_path):
    for name, number in (("consolidated", 1.0), ("model-00001-of-00001", 2.0)):
        safetensors.save_file({"w": torch.full((2,), number)}, tmp_path / f"{name}.safetensors")
    loaded = {"w": torch.zeros(2)}
    with pytest.raises(
        sk.FormatError, match=r"'w': it is in consolidated\.safetensors and in model"
    ):
        dcp.load(loaded, storage_reader=Reader(tmp_path))
    listing = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(listing))
    dcp.load(loaded, storage_reader=Reader(tmp_path))
    assert loaded["w"].tolist() == [2, 2]


def test_a_missing_shard_is_detected(tmp_path):
    dcp.save(in_parts(), storage_writer=Writer(tmp_path, save_distributed=True))
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").unlink()
    loaded = {name: torch.zeros_like(value) for name, value in with_parts().items()}
    with pytest.raises(sk.FormatError, match="its chunks have a hole"):
        dcp.load(loaded, storage_reader=Reader(tmp_path))


def test_nothing_there_and_hostile_headers(tmp_path):
    with pytest.raises(sk.NotACheckpoint, match=r"has no \.safetensors file"):
        dcp.load({"w": torch.ones(1)}, storage_reader=Reader(tmp_path))
    header = {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    for data in (
        struct.pack("<Q", len(text)) + text + bytes(8),
        struct.pack("<Q", 1 << 62) + text,
        b"short",
    ):
        file.write_bytes(data)
        with pytest.raises(sk.FormatError, match=r"FormatError: model\.safetensors: "):
            dcp.load({"w": torch.ones(1)}, storage_reader=Reader(tmp_path))


def test_only_the_requested_bytes_are_read(tmp_path, monkeypatch):
    dcp.save(
        {"w": torch.arange(1 << 20), "v": torch.ones(1 << 20)}, storage_writer=Writer(tmp_path)
    )
    read = []
    in_steps = LocalStore.read_steps

    def counted(self, name, offset, buffer, step, **more):
        read.append(buffer.nbytes)
        return in_steps(self, name, offset, buffer, step, **more)

    monkeypatch.setattr(LocalStore, "read_steps", counted)
    part = Parts.of(torch.zeros(1 << 20, dtype=torch.int64), [((1000,), (50,))])
    dcp.load({"w": part}, storage_reader=Reader(tmp_path))
    assert part.plain[1000:1050].tolist() == list(range(1000, 1050))
    assert not part.plain[1050:].any()
    assert 0 < sum(read) <= 4096


class Scratch(stock.DefaultLoadPlanner):
    """A planner that provides the same memory for every tensor, and copies from it on commit."""

    def resolve_tensor(self, read_item):
        self.wanted = super().resolve_tensor(read_item)
        if not hasattr(self, "memory"):
            self.memory = torch.empty_like(self.wanted)
        return self.memory

    def commit_tensor(self, read_item, tensor):
        self.wanted.copy_(tensor)


class Doubling(stock.DefaultSavePlanner):
    """A planner that saves other values, of another dtype."""

    def transform_object(self, write_item, value):
        return value.double() * 2


class Counting(Reader):
    """A reader with an action for each item."""

    seen = 0

    def _process_read_request(self, f, req, planner):
        type(self).seen += 1
        assert req.storage_index.fqn in f.keys()  # noqa: SIM118 - as safetensors has it
        assert f.get_slice(req.storage_index.fqn).get_shape() == [3, 2]
        super()._process_read_request(f, req, planner)


def test_planners_and_readers_of_users(tmp_path):
    saved = {f"w{n}": values(f"w{n}", (3, 2), torch.float32) for n in range(4)}
    dcp.save(saved, storage_writer=Writer(tmp_path))
    loaded = {name: torch.zeros(3, 2) for name in saved}
    dcp.load(loaded, storage_reader=Reader(tmp_path), planner=Scratch())
    check(loaded, saved)
    loaded = {name: torch.zeros(3, 2) for name in saved}
    dcp.load(loaded, storage_reader=Counting(tmp_path))
    check(loaded, saved)
    assert Counting.seen == 4
    dcp.save({"w": torch.arange(3.0)}, storage_writer=Writer(tmp_path), planner=Doubling())
    assert sk.open(tmp_path).read("w").tolist() == [0, 2, 4]
    assert sk.open(tmp_path).read("w").dtype == "f8"


def test_an_item_that_does_not_fit(tmp_path):
    class Wrong(dcp.DefaultLoadPlanner):
        def resolve_tensor(self, read_item):
            return torch.zeros(5)

    dcp.save({"w": torch.ones(3)}, storage_writer=Writer(tmp_path))
    with pytest.raises(
        sk.Mismatch, match=r"'w': the plan asks for a part of shape \[3\], .* \[5\]"
    ):
        dcp.load({"w": torch.ones(3)}, storage_reader=Reader(tmp_path), planner=Wrong())


def test_four_bit_floats(tmp_path):
    dtype = getattr(torch, dcp_hf.FLOAT4, None)
    if dtype is None:
        pytest.skip("this torch has none")
    saved = values("w", (3, 4), torch.uint8).view(dtype)
    dcp.save({"w": saved}, storage_writer=Writer(tmp_path))
    loaded = {"w": torch.zeros(3, 4, dtype=torch.uint8).view(dtype)}
    dcp.load(loaded, storage_reader=Reader(tmp_path))
    assert torch.equal(loaded["w"].view(torch.uint8), saved.view(torch.uint8))
    (file,) = tmp_path.glob("*.safetensors")
    theirs = safetensors.load_file(file)["w"]
    assert torch.equal(theirs.view(torch.uint8), saved.view(torch.uint8))


def test_storage_indices_are_torchs(tmp_path):
    dcp.save({"w": torch.ones(2)}, storage_writer=Writer(tmp_path))
    reader = Reader(tmp_path)
    (index,) = reader.read_metadata().storage_data
    assert index == MetadataIndex("w", torch.Size([0]))


WITHOUT = """
import sys, torch, torch.distributed.checkpoint as stock
for name in ("hf_storage", "quantized_hf_storage", "_hf_utils", "_consolidate_hf_safetensors"):
    sys.modules[f"torch.distributed.checkpoint.{name}"] = None
    vars(stock).pop(name, None)
import shardkeep.dcp as dcp
path = sys.argv[1]
writer = dcp.HuggingFaceStorageWriter(path, save_distributed=True, enable_consolidation=True)
dcp.save({"w": torch.arange(4)}, storage_writer=writer)
for folder in (path, path + "/sharded"):
    loaded = {"w": torch.zeros(4, dtype=torch.int64)}
    dcp.load(loaded, storage_reader=dcp.QuantizedHuggingFaceStorageReader(folder))
    assert loaded["w"].tolist() == [0, 1, 2, 3]
from shardkeep.dcp._hf_utils import _HFStorageInfo, _gen_file_name
from shardkeep.dcp.hf_storage import _metadata_fn
assert _gen_file_name(1, 2, 3) == "shard-00003-model-00001-of-00002.safetensors"
"""


def test_releases_that_have_none_of_it(tmp_path):
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT, str(tmp_path)], check=True, timeout=240
    )


@pytest.mark.gloo
def test_on_ranks(gloo, tmp_path):
    assert gloo.run(dcp_hf.save_and_load, str(tmp_path)) == ["fine"] * 4
    loaded = safetensors.load_file(tmp_path / "one" / "model-00001-of-00001.safetensors")
    check(loaded, dcp_hf.wholes(like_stock=False))
    whole = dcp_hf.wholes()
    three = sorted((tmp_path / "three").glob("*.safetensors"))
    assert len(three) == 3
    loaded = {}
    for file in three:
        loaded |= safetensors.load_file(file)
    check(loaded, whole)
    opened = sk.open(tmp_path / "three" / "sharded")
    assert opened.read("rows.int32").tobytes() == whole["rows.int32"].numpy().tobytes()


@pytest.mark.gloo
def test_replicas_on_ranks(gloo, tmp_path):
    assert gloo.run(dcp_hf.replicas, str(tmp_path)) == ["fine"] * 4
    loaded = {}
    for file in tmp_path.glob("*.safetensors"):
        loaded |= safetensors.load_file(file)
    assert len(loaded) == 6
    listing = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(listing["weight_map"].values()) == {p.name for p in tmp_path.glob("*.safetensors")}


@pytest.mark.gloo
def test_refused_on_all_ranks(gloo, tmp_path):
    told = gloo.run(dcp_hf.refused, str(tmp_path), size=2)
    assert len(set(told)) == 1
    assert "can hold only tensors, not epoch, name: " in told[0]
    assert told[0].endswith("| []")
    told = gloo.run(dcp_hf.parts_without_distributed, str(tmp_path))
    assert all("is sharded: pass save_distributed=True" in one for one in told)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gloo
def test_fewer_ranks_later(gloo, tmp_path):
    assert gloo.run(dcp_hf.fewer_ranks_later, str(tmp_path), size=2) == ["fine"] * 2
    assert sk.open(tmp_path).read("w").tolist() == [n + 3 for n in range(8)]


@pytest.mark.gloo
def test_ranks_that_commit_alone(gloo, tmp_path):
    assert gloo.run(dcp_hf.for_themselves, str(tmp_path), size=2) == ["fine"] * 2
    assert len(list(tmp_path.iterdir())) == 2
