"""`shardkeep.dcp` replaces `torch.distributed.checkpoint`."""

from __future__ import annotations

import dataclasses
import inspect
import socket
import warnings
from collections import OrderedDict

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint.metadata import MetadataIndex

import shardkeep as sk
import shardkeep.dcp as dcp
from shardkeep.checkpoint.reader import open_reader
from support import drop_in
from support.scenarios import blank, equal, values

pytestmark = [pytestmark, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


def state() -> dict:
    weight = values("w", (3, 4), torch.float32)
    return {
        "w": weight,
        "tied": weight,
        "p": torch.nn.Parameter(values("p", (2,), torch.bfloat16).clone()),
        "nested": {"list": [values("l", (2,), torch.int16), {"x": 1}], "tuple": (1, 2)},
        "optim": {
            "state": {0: {"step": torch.tensor(2.0)}, 1: {"step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 0.5, "betas": (0.9, 0.99), "params": [0, 1]}],
        },
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "none": torch.zeros(0, 2),
        "step": 3,
        "plain": [1, 2],
        "ordered": OrderedDict(a=torch.ones(1)),
    }


def other(made: dict) -> dict:
    made = blank(made)
    made["ordered"] = OrderedDict(made["ordered"])
    made["p"] = torch.nn.Parameter(made["p"])
    return made


def same(loaded: dict, saved: dict) -> None:
    assert equal({**loaded, "p": loaded["p"].data}, {**saved, "p": saved["p"].data})


@pytest.mark.parametrize("name", [name for name in dcp.__all__ if hasattr(stock, name)])
def test_signatures_are_torchs(name):
    theirs, ours = (inspect.signature(getattr(module, name)) for module in (stock, dcp))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize("method", ["reset", "validate_checkpoint_id"])
def test_methods_of_readers_and_writers_have_torchs_parameters(method):
    for name in ("FileSystemReader", "FileSystemWriter"):
        theirs, ours = (getattr(getattr(m, name), method, None) for m in (stock, dcp))
        if theirs is not None:
            assert list(inspect.signature(ours).parameters) == list(
                inspect.signature(theirs).parameters
            )


PATHS = [(stock, dcp), (dcp, stock), (dcp, dcp)]


@pytest.mark.parametrize(("writer", "reader"), PATHS, ids=["to us", "from us", "both"])
@pytest.mark.parametrize("how", ["checkpoint_id", "objects", "reset", "no_dist"])
def test_save_and_load(tmp_path, writer, reader, how):
    saved = state()
    more = {"no_dist": True} if how == "no_dist" else {}
    if how in ("checkpoint_id", "no_dist"):
        writer.save(saved, checkpoint_id=tmp_path, **more)
    else:
        path = tmp_path if how == "objects" else tmp_path / "elsewhere"
        there = {} if how == "objects" else {"checkpoint_id": tmp_path}
        planner = writer.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        writer.save(saved, storage_writer=writer.FileSystemWriter(path), planner=planner, **there)
    assert (tmp_path / ".metadata").exists()
    loaded = other(saved)
    if how in ("checkpoint_id", "no_dist"):
        reader.load(loaded, checkpoint_id=str(tmp_path), **more)
    else:
        path = tmp_path if how == "objects" else tmp_path / "elsewhere"
        there = {} if how == "objects" else {"checkpoint_id": tmp_path}
        planner = reader.DefaultLoadPlanner()
        reader.load(loaded, storage_reader=reader.FileSystemReader(path), planner=planner, **there)
    if reader is dcp:
        same(loaded, saved)
        return
    # Stock torch puts the value of an integer key under the key's text, beside the key itself.
    for number, inner in loaded["optim"]["state"].items():
        if isinstance(number, int):
            assert equal(inner, saved["optim"]["state"][number])
    tensors = {name: v for name, v in loaded.items() if isinstance(v, torch.Tensor)}
    assert all(equal(v.detach(), saved[name].detach()) for name, v in tensors.items())
    assert loaded["step"] == 3


def plain(value):
    """Return metadata without what depends on the process that wrote or read it."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        # The index has no `requires_grad`, and no ids of torch's own saves and loads.
        for name in ("requires_grad", "storage_meta", "version"):
            fields.pop(name, None)
        return type(value).__name__, fields
    if isinstance(value, dict):
        return {
            (k if isinstance(k, str) else (k.fqn, k.offset, k.index)): plain(v)
            for k, v in value.items()
        }
    return [plain(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("module", [stock, dcp], ids=["stock", "ours"])
@pytest.mark.parametrize("flatten", [True, False])
def test_metadata_equals_that_of_stocks_reader(tmp_path, module, flatten):
    returned = module.save(
        state(), checkpoint_id=tmp_path, planner=module.DefaultSavePlanner(flatten)
    )
    theirs = stock.FileSystemReader(tmp_path).read_metadata()
    ours = dcp.FileSystemReader(tmp_path).read_metadata()
    assert type(ours) is type(theirs)
    legacy_duplicates = open_reader(
        tmp_path
    ).index.legacy_duplicates  # only torch 2.3 and older look for these
    assert bool(legacy_duplicates) == (flatten and module is dcp)
    for name in legacy_duplicates:
        del theirs.state_dict_metadata[name], theirs.planner_data[name]
        del theirs.storage_data[MetadataIndex(name)]
    assert plain(ours) == plain(theirs)
    assert plain(returned) == plain(theirs)
    assert len(plain(ours)[1]["storage_data"]) >= len(ours.state_dict_metadata)


class Upward(stock.DefaultLoadPlanner):
    """A planner that loads into tensors of its own, as planners that convert do."""

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self.wide = {"w": torch.zeros(3, 4, dtype=torch.float64), "n.x": 0}
        self.state_dict = self.wide


def test_torchs_planner_does_not_mistake_our_checkpoints_for_old_ones(tmp_path):
    w = values("w", (3, 4), torch.float32)
    dcp.save({"w": w, "n": {"x": 1}}, checkpoint_id=tmp_path)
    assert open_reader(tmp_path).index.legacy_duplicates  # by which torch's planner knows old ones
    planner = Upward()
    dcp.load({"w": torch.zeros(3, 4), "n": {"x": 0}}, checkpoint_id=tmp_path, planner=planner)
    assert torch.equal(planner.wide["w"], w.double())


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("writer", [stock, dcp], ids=["stock", "ours"])
def test_flattened_and_unflattened_checkpoints_load_both_ways(tmp_path, writer, first, second):
    saved = state()
    writer.save(saved, checkpoint_id=tmp_path, planner=writer.DefaultSavePlanner(first))
    loaded = other(saved)
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=second)
    dcp.load(loaded, checkpoint_id=tmp_path, planner=planner)
    same(loaded, saved)
    if first == second or not first:
        return
    names = set(sk.open(tmp_path))
    assert "optim.state.0.step" in names


def test_our_unflattened_checkpoints_load_in_stock_torch(tmp_path):
    saved = state()
    dcp.save(saved, checkpoint_id=tmp_path, planner=dcp.DefaultSavePlanner(False))
    loaded = {"w": torch.zeros(3, 4), "step": 0}
    planner = stock.DefaultLoadPlanner(flatten_state_dict=False)
    stock.load(loaded, checkpoint_id=tmp_path, planner=planner)
    assert equal(loaded["w"], saved["w"])  # values, stock torch does not bring back in this form


def test_integer_keys_stay_integers(tmp_path):
    stock.save({"per": {0: {"a": 1}, 7: torch.ones(1)}}, checkpoint_id=tmp_path)
    loaded = {"per": {0: {"a": 0}, 7: torch.zeros(1)}}
    dcp.load(loaded, checkpoint_id=tmp_path)
    assert equal(loaded, {"per": {0: {"a": 1}, 7: torch.ones(1)}})


class Counter:
    """A user's object with a state of its own."""

    def __init__(self, count: int) -> None:
        self.count, self.weight = count, torch.full((2,), float(count))

    def state_dict(self) -> dict:
        return {"count": self.count, "weight": self.weight}

    def load_state_dict(self, state: dict) -> None:
        self.count, self.weight = state["count"], state["weight"]


@pytest.mark.parametrize(("writer", "reader"), PATHS, ids=["to us", "from us", "both"])
def test_stateful_objects(tmp_path, writer, reader):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    writer.save({"model": model, "counter": Counter(5)}, checkpoint_id=tmp_path)
    later, counter = torch.nn.Linear(2, 2), Counter(1)
    reader.load({"model": later, "counter": counter}, checkpoint_id=tmp_path)
    assert counter.count == 5
    assert equal(counter.weight, torch.full((2,), 5.0))
    assert equal(later.weight.data, model.weight.data)


def test_another_dtype_is_cast_with_a_warning(tmp_path):
    dcp.save({"w": torch.arange(3.0)}, checkpoint_id=tmp_path)
    loaded = {"w": torch.zeros(3, dtype=torch.float64)}
    with pytest.warns(UserWarning, match="^w: stored as float32, cast to float64$"):
        dcp.load(loaded, checkpoint_id=tmp_path)
    assert loaded["w"].tolist() == [0, 1, 2]


def test_missing_names_are_refused_or_skipped(tmp_path):
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path)
    loaded = {"w": torch.zeros(3), "new": torch.full((1,), 7.0), "epoch": 9}
    with pytest.raises(sk.Mismatch, match="new: missing: not in the checkpoint"):
        dcp.load(loaded, checkpoint_id=tmp_path)
    assert not loaded["w"].any()
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(loaded, checkpoint_id=tmp_path, planner=planner)
    assert equal(loaded, {"w": torch.ones(3), "new": torch.full((1,), 7.0), "epoch": 9})


def test_overwriting_is_on_as_in_torch_and_can_be_turned_off(tmp_path):
    for number in (1, 2):
        dcp.save({"n": number}, checkpoint_id=tmp_path)
    assert sk.open(tmp_path).read("n") == 2
    with pytest.raises(sk.AlreadyExists, match="already holds a checkpoint"):
        dcp.save({"n": 3}, storage_writer=dcp.FileSystemWriter(tmp_path, overwrite=False))


def test_a_path_or_storage_is_required():
    with pytest.raises(RuntimeError, match=r"^give `checkpoint_id`, or a `storage_writer`$"):
        dcp.save({"n": 1})
    with pytest.raises(RuntimeError, match=r"^give `checkpoint_id`, or a `storage_reader`$"):
        dcp.load({"n": 1})
    with pytest.raises(RuntimeError, match=r"^Cannot detect a `storage_writer` for"):
        dcp.save({"n": 1}, checkpoint_id="odd://x")


def test_plain_use_raises_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dcp.save(state(), checkpoint_id=tmp_path)
        dcp.load(other(state()), checkpoint_id=tmp_path)


@pytest.mark.gloo
def test_on_ranks_and_on_a_group_of_them(gloo, tmp_path):
    assert gloo.run(drop_in.both_ways, str(tmp_path)) == ["fine"] * 4
    assert sk.open(tmp_path / "all").verify().ok
    assert sk.open(tmp_path / "group").verify().ok


@pytest.mark.gloo
def test_ranks_may_call_one_place_differently(gloo, tmp_path):
    assert gloo.run(drop_in.own_names_for_one_place, str(tmp_path), size=2) == ["fine"] * 2


@pytest.mark.gloo
def test_ranks_on_disks_of_their_own_commit_nothing(gloo, tmp_path):
    said = gloo.run(drop_in.disks_of_their_own, str(tmp_path), size=2)
    host = socket.gethostname()
    what = (
        f"{tmp_path}/disk0: what rank 1 on {host} wrote there is not there for rank 0 on {host}: "
        "ranks must save to one place that all of them see; nothing was committed"
    )
    assert all(what in each for each in said)
    assert not list(tmp_path.rglob("*.metadata"))
    assert list((tmp_path / "disk0").iterdir()) == []


class Listening(dict):
    """A mapping that records the values put into it."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.__dict__.setdefault("heard", set()).add(key)


@pytest.mark.parametrize("module", [stock, dcp], ids=["stock", "ours"])
def test_loaded_values_are_set_and_stateful_objects_are_kept(tmp_path, module):
    module.save({"n": {"w": torch.ones(2)}, "counter": Counter(3)}, checkpoint_id=tmp_path)
    inner, counter = {"w": torch.zeros(2)}, Counter(0)
    state = Listening(n=inner, counter=counter)
    module.load(state, checkpoint_id=tmp_path)
    assert state.heard == {"n"}
    assert state["n"] is inner
    assert inner["w"].tolist() == [1.0, 1.0]
    assert state["counter"] is counter
    assert counter.count == 3
