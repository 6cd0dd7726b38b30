"""The default planners work for classes that build on them, without torch's defects."""

from __future__ import annotations

import json
import tarfile
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint import default_planner as stock_planner
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
from shardkeep.dcp import default_planner
from shardkeep.dcp.default_planner import _EmptyStateDictLoadPlanner
from shardkeep.dcp.state_dict_loader import _load_state_dict_from_keys
from support import dcp_planners
from support.dcp_planners import LoadPlanner, SavePlanner
from support.scenarios import equal, values

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:.*torch.distributed is"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]
GOLDEN = Path(__file__).parents[1] / "golden"
NEVER_STORED = ("per_rank_objects",)  # Up to 2.3, only the coordinator stored objects.


class Own:
    """A class of the user."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Own) and other.n == self.n

    __hash__ = None


# --- Replicas -------------------------------------------------------------------------------------


def shard(name: str, full: int, offset: int, size: int, kind=WriteItemType.SHARD) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size([offset]), torch.Size([size]))
    properties = TensorProperties(dtype=torch.float32)
    data = TensorWriteData(chunk, properties, torch.Size([full]))
    return WriteItem(MetadataIndex(name, chunk.offsets), kind, tensor_data=data)


def thing(name: str) -> WriteItem:
    return WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)


def deduplicated(plans: list[list[WriteItem]], **options) -> list[list[WriteItem]]:
    planner = dcp.DefaultSavePlanner(**options)
    given = [SavePlan(list(items), storage_data=n) for n, items in enumerate(plans)]
    made = planner._dedup_save_plans(given)
    assert [plan.storage_data for plan in made] == list(range(len(plans)))
    assert [plan.items for plan in given] == plans
    return [plan.items for plan in made]


def nbytes(items: list[WriteItem]) -> int:
    return sum(4 * item.tensor_data.chunk.sizes[0] for item in items if item.tensor_data)


@st.composite
def held(draw):
    """Return the items of each rank: any part of some items, in any order."""
    count = draw(st.integers(1, 12))
    items = [
        shard(f"t{n}", draw(st.integers(1, 1000)), draw(st.integers(0, 3)), draw(st.integers(0, 9)))
        if draw(st.booleans())
        else thing(f"o{n}")
        for n in range(count)
    ]
    ranks = draw(st.integers(1, 5))
    return [draw(st.lists(st.sampled_from(items), unique_by=id)) for _ in range(ranks)]


@given(held(), st.booleans())
@settings(max_examples=80)
def test_each_item_is_written_once_by_a_rank_that_has_it(plans, to_lowest):
    made = deduplicated(plans, dedup_save_to_lowest_rank=to_lowest)
    kept = [item.index for items in made for item in items]
    assert len(kept) == len(set(kept))
    assert set(kept) == {item.index for items in plans for item in items}
    for before, after in zip(plans, made, strict=True):
        assert after == [item for item in before if item in after]
    if to_lowest:
        for rank, items in enumerate(made):
            earlier = {item.index for plan in plans[:rank] for item in plan}
            assert not earlier & {item.index for item in items}
    assert deduplicated(plans, dedup_save_to_lowest_rank=to_lowest) == made


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(2, 6))
@settings(max_examples=60)
def test_replicas_are_distributed_evenly(sizes, ranks):
    items = [shard(f"t{n}", 10**6, 0, size) for n, size in enumerate(sizes)]
    loads = [nbytes(items) for items in deduplicated([items] * ranks)]
    assert max(loads) - min(loads) <= 4 * max(sizes)


def test_shards_are_balanced_by_their_own_size():
    """Half of the shards belong to huge tensors, whose size would put them all on one rank."""
    items = [shard(f"huge{n}", 10**9, 0, 100) for n in range(2)]
    items += [shard(f"small{n}", 100, 0, 100) for n in range(2)]
    plans = [[*items, shard("own", 300, 0, 300)], items, items]

    def loads(planner) -> list[int]:
        made = planner._dedup_save_plans([SavePlan(plan) for plan in plans])
        return sorted(nbytes(plan.items) for plan in made)

    assert loads(dcp.DefaultSavePlanner()) == [800, 800, 1200]
    if hasattr(stock.DefaultSavePlanner, "_dedup_save_plans"):
        assert loads(stock.DefaultSavePlanner()) != [800, 800, 1200]


def test_an_empty_shard_does_not_replace_the_shard_at_its_offset():
    plans = [[shard("w", 8, 0, 0)], [shard("w", 8, 0, 8)]]
    for to_lowest in (True, False):
        made = deduplicated(plans, dedup_save_to_lowest_rank=to_lowest)
        assert nbytes(made[0] + made[1]) == 32


def test_plans_do_not_depend_on_the_order_of_hashes(tmp_path):
    """A process with other hashes of strings makes the same plans."""
    import os
    import subprocess
    import sys

    program = (
        "import test_planners as t, hashlib\n"
        "items = [t.shard(f't{n}', 9 * n + 1, 0, 9 * n + 1) for n in range(40)]\n"
        "made = t.deduplicated([items, items[::-1], items[5:]])\n"
        "print([[item.index.fqn for item in plan] for plan in made])"
    )
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *sys.path])
    told = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1


@pytest.mark.gloo
def test_ranks_write_equal_shares_of_replicas(gloo, tmp_path):
    shares = [sum(sizes) for sizes in gloo.run(dcp_planners.share, str(tmp_path), size=3)]
    assert max(shares) - min(shares) <= 4 * 1024 * 24 + 20_000
    assert min(shares) > 4 * 1024 * 24


# --- Options --------------------------------------------------------------------------------------


def test_options_of_later_releases_are_accepted(monkeypatch):
    monkeypatch.setattr(default_planner, "_CACHES_PLANS", False)
    planner = dcp.DefaultSavePlanner(True, True, None, True, enable_plan_caching=True)
    assert planner.dedup_save_to_lowest_rank
    assert isinstance(planner, stock.DefaultSavePlanner)
    assert isinstance(dcp.DefaultLoadPlanner(), stock.DefaultLoadPlanner)


@pytest.mark.gloo
def test_plans_are_kept_over_saves_until_the_state_changes(gloo, tmp_path):
    if not default_planner._CACHES_PLANS:
        pytest.skip("this torch keeps no plans")
    sent = gloo.run(dcp_planners.cached, str(tmp_path), size=2)
    # A change of dtype (at 3) and a new name (at 5) are sent; unchanged plans are not.
    assert [[count > 0 for count in counts] for counts in sent] == [
        [True, False, False, True, False, True, False]
    ] * 2


@pytest.mark.gloo
def test_plans_that_other_ranks_have_kept_are_refused(gloo, tmp_path):
    if not default_planner._CACHES_PLANS:
        pytest.skip("this torch keeps no plans")
    first, second, *_ = gloo.run(dcp_planners.other_group, str(tmp_path), size=3)
    for told in (first, second):
        assert "Kept has kept 3 plans of an earlier save, but 2 ranks save now: use a" in told
    assert not (tmp_path / "two" / ".metadata").exists()


# --- Loads in steps -------------------------------------------------------------------------------


def state() -> dict:
    return {
        "model": OrderedDict(w=values("w", (3, 2), torch.float32), b=values("b", (2,), torch.int8)),
        "optim": {
            "state": {0: {"step": torch.tensor(2.0), "n": 4}, 10: {"step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 0.5, "betas": (0.9, 0.99), "params": [0, 10]}],
        },
        "list": [values("l", (2,), torch.int16), {"x": 1}, [torch.ones(1)]],
        "tuple": (1, torch.ones(2)),
        "per": {1: {"a": 1}, 2: [1, 2]},
        "epoch": 7,
        "none": None,
    }


def blank(value):
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return type(value)((key, blank(inner)) for key, inner in value.items())
    if isinstance(value, list):
        return [blank(inner) for inner in value]
    return None


@pytest.mark.parametrize("writer", [stock, dcp], ids=["stock", "ours"])
@pytest.mark.parametrize("flatten", [True, False], ids=["flat", "nested"])
def test_values_are_loaded_under_the_keys_of_the_state(tmp_path, writer, flatten):
    saved = state()
    planner = SavePlanner if writer is dcp else stock.DefaultSavePlanner
    writer.save(saved, checkpoint_id=tmp_path, planner=planner(flatten_state_dict=flatten))
    loaded = blank(saved)
    planner = LoadPlanner(flatten_state_dict=flatten)
    dcp.load(loaded, checkpoint_id=tmp_path, planner=planner)
    assert equal(loaded, saved)
    assert list(loaded["optim"]["state"]) == [0, 10]


@pytest.mark.parametrize("flatten", [True, False], ids=["flat", "nested"])
def test_tensors_and_containers_of_the_caller_are_filled(tmp_path, flatten):
    saved = state()
    dcp.save(saved, checkpoint_id=tmp_path, planner=SavePlanner(flatten_state_dict=flatten))
    loaded = blank(saved)
    model, weight, group = loaded["model"], loaded["model"]["w"], loaded["optim"]["param_groups"]
    dcp.load(loaded, checkpoint_id=tmp_path, planner=LoadPlanner(flatten_state_dict=flatten))
    assert loaded["model"] is model
    assert equal(model, saved["model"])
    assert equal(weight, saved["model"]["w"])
    assert group == saved["optim"]["param_groups"]


def test_nested_values_that_differ_from_the_callers_are_replaced(tmp_path):
    saved = {"a": {"x": torch.ones(2), "y": 1}, "b": [1, 2], 3: {"n": 1}}
    dcp.save(saved, checkpoint_id=tmp_path, planner=SavePlanner(False))
    loaded = {"a": {"x": torch.zeros(3), "z": 0}, "b": [1, 2, 3], 3: {"n": 0}}
    dcp.load(loaded, checkpoint_id=tmp_path, planner=LoadPlanner(False))
    assert equal(loaded, saved)


@pytest.mark.parametrize("flatten", [True, False], ids=["flat", "nested"])
def test_objects_of_classes_that_are_not_trusted_are_refused(tmp_path, flatten):
    stock.save({"own": {"it": Own(3)}}, checkpoint_id=tmp_path,
               planner=stock.DefaultSavePlanner(flatten))  # fmt: skip
    loaded = {"own": {"it": Own(0)}}
    name = f"{Own.__module__}.Own"
    line = f"torch.serialization.add_safe_globals\\(\\[{name}\\]\\)"
    with pytest.raises(sk.Untrusted, match=line) as caught:
        dcp.load(loaded, checkpoint_id=tmp_path, planner=LoadPlanner(flatten))
    assert caught.value.classes == (name,)
    assert loaded["own"]["it"].n == 0
    with torch.serialization.safe_globals([Own]):
        dcp.load(loaded, checkpoint_id=tmp_path, planner=LoadPlanner(flatten))
    assert loaded["own"]["it"].n == 3


def test_a_value_that_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(sk.Conflict, match=r"object 'a.f' cannot be pickled"):
        dcp.save({"a": {"f": lambda: 0}}, checkpoint_id=tmp_path, planner=SavePlanner())
    assert not (tmp_path / ".metadata").exists()


def test_checkpoints_in_the_form_of_torch_2_3_load_into_nested_states(tmp_path, monkeypatch):
    version = pytest.importorskip("torch.distributed.checkpoint._version")
    saved = state()
    monkeypatch.setattr(version, "_derived_version", "2_3")
    stock.save(saved, checkpoint_id=tmp_path)
    monkeypatch.setattr(version, "_derived_version", None)
    assert "optim.param_groups" in sk.open(tmp_path)
    loaded = blank(saved)
    dcp.load(loaded, checkpoint_id=tmp_path, planner=LoadPlanner())
    assert equal(loaded, saved)


@pytest.mark.parametrize("module", [stock, dcp], ids=["stock", "ours"])
def test_legacy_duplicates_do_not_change_the_callers_state(tmp_path, module):
    """For torch 2.3, the checkpoint also has "config" as one object, which stock's reader shows."""
    dcp.save({"config": {"a": 1, "b": {"c": 2}}, "w": torch.ones(1)}, checkpoint_id=tmp_path)
    reader = module.FileSystemReader(tmp_path)
    assert ("config" in reader.read_metadata().state_dict_metadata) == (module is stock)
    loaded = {"config": {"a": 0, "b": {"c": 0}, "new": 5}, "w": torch.zeros(1)}
    inner = loaded["config"]
    planner = LoadPlanner(allow_partial_load=True)
    dcp.load(loaded, storage_reader=reader, planner=planner)
    assert loaded["config"] is inner
    assert inner == {"a": 1, "b": {"c": 2}, "new": 5}
    assert "config" not in planner.metadata.state_dict_metadata


@pytest.mark.parametrize("planner", [dcp.DefaultLoadPlanner, LoadPlanner], ids=["engine", "steps"])
def test_values_that_the_checkpoint_lacks_are_unchanged(tmp_path, planner):
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path)
    meta = torch.zeros(2, device="meta")
    kept = [torch.float32, Own(4), {1, 2}]
    loaded = {"w": meta, "lists": kept, "kind": Own(5), "path": Path("x")}
    dcp.load(loaded, checkpoint_id=tmp_path, planner=planner(allow_partial_load=True))
    assert equal(loaded["w"], torch.ones(2))
    assert loaded["lists"] is kept
    assert kept == [torch.float32, Own(4), {1, 2}]
    assert (loaded["kind"], loaded["path"]) == (Own(5), Path("x"))


@pytest.mark.parametrize("planner", [dcp.DefaultLoadPlanner, LoadPlanner], ids=["engine", "steps"])
def test_the_planner_has_the_metadata_after_a_load(tmp_path, planner):
    made = planner()
    for names in (["a"], ["a", "b"]):
        dcp.save(dict.fromkeys(names, torch.ones(1)), checkpoint_id=tmp_path)
        dcp.load({"a": torch.zeros(1)}, checkpoint_id=tmp_path, planner=made)
        assert list(made.metadata.state_dict_metadata) == names


# --- Without a template ---------------------------------------------------------------------------


def strings(value):
    """Return the value with keys as strings, as in torch's metadata."""
    if isinstance(value, dict):
        return {str(key): strings(inner) for key, inner in value.items()}
    return [strings(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("writer", [stock, dcp], ids=["stock", "ours"])
@pytest.mark.parametrize("flatten", [True, False], ids=["flat", "nested"])
def test_an_empty_state_is_filled_with_the_whole_checkpoint(tmp_path, writer, flatten):
    saved = state()
    writer.save(saved, checkpoint_id=tmp_path, planner=writer.DefaultSavePlanner(flatten))
    loaded: dict = {}
    dcp.load(loaded, checkpoint_id=tmp_path, planner=_EmptyStateDictLoadPlanner())
    # Integer keys are strings if they come from torch's metadata, and in its own objects.
    assert equal(loaded, strings(saved) if flatten or writer is stock else saved)


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"epoch"}, {"epoch": 7}),
        ("per", {"per": {1: {"a": 1}, 2: [1, 2]}}),
        ({"per.1.a", "none"}, {"per": {1: {"a": 1}}, "none": None}),
        ({"list.1.x"}, {"list": [None, {"x": 1}]}),
        ({"optim.state.10"}, {"optim": {"state": {10: {"step": torch.tensor(3.0)}}}}),
        ({"absent"}, {}),
    ],
)
@pytest.mark.parametrize("steps", [False, True], ids=["engine", "steps"])
def test_some_keys_of_a_checkpoint_are_loaded(tmp_path, keys, found, steps):
    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            return super().read_metadata(*args, **kwargs)

    dcp.save(state(), checkpoint_id=tmp_path)
    where = {"storage_reader": Reader(tmp_path)} if steps else {"checkpoint_id": tmp_path}
    loaded = _load_state_dict_from_keys(keys, **where)
    assert equal(loaded, strings(found) if steps else found)


def test_keys_are_loaded_without_paths_in_torchs_metadata(tmp_path):
    stock.save({"a": 1, "b": {"c": 2}}, checkpoint_id=tmp_path,
               planner=stock.DefaultSavePlanner(False))  # fmt: skip
    loaded: dict = {}
    dcp.load(loaded, checkpoint_id=tmp_path, planner=_EmptyStateDictLoadPlanner(keys={"b"}))
    assert loaded == {"b": {"c": 2}}


def test_a_state_that_is_not_empty_is_refused(tmp_path):
    dcp.save({"a": 1}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match="the state must be empty"):
        dcp.load({"a": 1}, checkpoint_id=tmp_path, planner=_EmptyStateDictLoadPlanner())
    with pytest.raises(ValueError, match="metadata must not be None"):
        _EmptyStateDictLoadPlanner().set_up_planner({})
    planner = _EmptyStateDictLoadPlanner({"a"}, True, False, allow_partial_load=True)
    assert (planner.keys, planner.flatten_sharded_tensors) == ({"a"}, False)
    assert isinstance(planner, dcp.DefaultLoadPlanner)


@pytest.mark.parametrize("release", ["2.0.1", "2.3.1", "2.15.0"])
def test_an_empty_state_is_filled_from_other_releases(tmp_path, release):
    from compat.expected import compare

    with tarfile.open(GOLDEN / f"{release}.tar.xz") as archive:
        archive.extractall(tmp_path)
    refused, wrong, right = [], [], 0
    for file in sorted(tmp_path.glob("**/expected.json")):
        if not (file.parent / "ckpt" / ".metadata").exists():
            continue
        loaded: dict = {}
        try:
            dcp.load(loaded, checkpoint_id=file.parent / "ckpt",
                     planner=_EmptyStateDictLoadPlanner())  # fmt: skip
        except (sk.Untrusted, sk.Mismatch, RuntimeError):
            refused.append(file.parent.name)
            continue
        lines = compare(json.loads(file.read_text()), loaded).differences
        allowed = NEVER_STORED if release[:3] in ("2.0", "2.3") else ()
        wrong += [line for line in lines if not (file.parent.name in allowed and "missing" in line)]
        right += 1
    assert wrong == []
    # Classes of the script that wrote them, and dtypes that this torch lacks or can't allocate.
    assert {name.split(".")[0] for name in refused} <= {
        "objects",
        "dtypes_in_objects",
        "more_dtypes",
    }
    assert right >= 20


@pytest.mark.gloo
def test_every_rank_loads_without_a_template(gloo, tmp_path):
    assert gloo.run(dcp_planners.without_template, str(tmp_path), size=2) == [[0, 7]] * 2


# --- The optimizer's own function -----------------------------------------------------------------


@pytest.mark.gloo
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_optimizer_state_of_fsdp_is_laid_out_without_a_template(gloo, tmp_path):
    told = gloo.run(dcp_planners.fsdp, str(tmp_path), size=2)
    for line in told:
        assert "the checkpoint has no flattened state under 'nothing'" in line


def test_optimizer_state_is_not_sharded_without_a_process_group(tmp_path):
    from shardkeep.dcp.optimizer import load_sharded_optimizer_state_dict

    optim = {"state": {"w": {"m": values("m", (3, 2), torch.float32), "step": torch.tensor(4.0)}},
             "param_groups": [{"lr": 0.5, "params": ["w"]}]}  # fmt: skip
    dcp.save({"optim": optim, "model": {"w": torch.ones(3, 2)}}, checkpoint_id=tmp_path)
    reader = dcp.FileSystemReader(tmp_path)
    loaded = load_sharded_optimizer_state_dict({"w": torch.ones(3, 2)}, "optim", reader)
    assert equal(loaded, {"optim": optim})


def test_reexported_functions_are_torchs():
    assert default_planner._validate_global_plan is stock_planner._validate_global_plan
    assert default_planner.create_default_local_save_plan is (
        stock_planner.create_default_local_save_plan
    )
