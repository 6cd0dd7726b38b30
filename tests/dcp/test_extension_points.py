"""Customized planners and storage are called as by torch; without any, no step is called."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

import torch.distributed.checkpoint as stock

import shardkeep as sk
import shardkeep.dcp as dcp
from shardkeep.dcp.operations import engine_choice, planner_protocol
from support import dcp_custom
from support.dcp_custom_planners import knows_only_the_old_signature
from support.dcp_custom_storage import ExtensionRegistry, Xor
from support.scenarios import equal

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:.*torch.distributed is"),
    pytest.mark.filterwarnings("ignore:.*set_up_planner"),
    pytest.mark.filterwarnings("ignore:.*stored as .*, cast to"),
    pytest.mark.filterwarnings("ignore:.*Please use DTensor instead"),
]


@pytest.mark.parametrize("base", ["stock", "ours"])
@pytest.mark.parametrize("name", list(dcp_custom.CASES))
def test_in_one_process(tmp_path, name, base):
    log = dcp_custom.run(0, 1, name, base, str(tmp_path))
    # `run` has compared the calls of both engines; there must be some.
    assert bool(log) == (name != "has_a_file_system_of_its_own")


@pytest.mark.parametrize("name", list(dcp_custom.CASES))
def test_on_four_ranks(gloo, tmp_path, name):
    logs = gloo.run("support.dcp_custom:run_all", name, str(tmp_path), size=4)
    globally = [[call[1] for call in log if "global" in call[1]] for log in logs]
    assert not any(globally[1:])


def test_the_order_of_calls_is_the_documented_one(gloo, tmp_path):
    """The whole order is checked once; every other case is compared with stock torch."""
    logs = gloo.run("support.dcp_custom:order", str(tmp_path), size=4)
    items = ("resolve_data", "load_bytes", "resolve_tensor", "commit_tensor")
    for rank, log in enumerate(logs):
        names = [call[1] for call in log if call[1] not in items]
        assert names == [
            "storage_meta",
            "set_up_planner",
            "set_up_storage_writer",
            "create_local_plan",
            "prepare_local_plan",
            *(["create_global_plan", "prepare_global_plan"] if rank == 0 else []),
            "finish_plan",
            "write_data",
            *(["finish"] if rank == 0 else []),
            "read_metadata",
            "set_up_planner",
            "set_up_storage_reader",
            "create_local_plan",
            "prepare_local_plan",
            *(["create_global_plan", "prepare_global_plan"] if rank == 0 else []),
            "finish_plan",
            "read_data",
        ]


# --- where nothing is customised -----------------------------------------------------------------


class OwnSavePlanner(stock.DefaultSavePlanner):
    """A subclass without an override of a method that is called."""

    def __init__(self, note: str = "") -> None:
        super().__init__()
        self.note = note


class OwnLoadPlanner(dcp.DefaultLoadPlanner):
    """A subclass without overrides."""


class OwnWriter(stock.FileSystemWriter):
    """A subclass without an override of a method that is called."""

    def __init__(self, path: str) -> None:
        super().__init__(path, thread_count=2)


class OwnReader(dcp.FileSystemReader):
    """A subclass without overrides."""


PLAIN = [
    ({}, {}),
    (
        {"planner": stock.DefaultSavePlanner, "storage_writer": stock.FileSystemWriter},
        {"planner": stock.DefaultLoadPlanner, "storage_reader": stock.FileSystemReader},
    ),
    (
        {"planner": dcp.DefaultSavePlanner, "storage_writer": dcp.FileSystemWriter},
        {"planner": dcp.DefaultLoadPlanner, "storage_reader": dcp.FileSystemReader},
    ),
    (
        {"planner": OwnSavePlanner, "storage_writer": OwnWriter},
        {"planner": OwnLoadPlanner, "storage_reader": OwnReader},
    ),
]


def made(kinds: dict, path: object) -> dict:
    return {name: kind() if name == "planner" else kind(str(path)) for name, kind in kinds.items()}


@pytest.fixture
def no_plans(monkeypatch):
    """Make every method that creates plans fail."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a plan was made")

    for kind in (stock.planner.SavePlan, stock.planner.LoadPlan, stock.planner.WriteItem):
        monkeypatch.setattr(kind, "__init__", forbidden)
    return monkeypatch


@pytest.mark.parametrize(("saving", "loading"), PLAIN, ids=["none", "stock", "ours", "subclasses"])
def test_without_customization_the_engine_works_alone(tmp_path, saving, loading, no_plans):
    saved = dcp_custom.state(0, 1)
    dcp.save(saved, **(made(saving, tmp_path) or {"checkpoint_id": tmp_path}))
    loaded = dcp_custom.cleared(saved)
    dcp.load(loaded, **(made(loading, tmp_path) or {"checkpoint_id": tmp_path}))
    assert equal(loaded, saved)
    with pytest.raises(sk.dcp.CheckpointException, match="a plan was made"):
        dcp.save(saved, checkpoint_id=tmp_path / "steps", planner=Changed())


class Changed(stock.DefaultSavePlanner):
    """A subclass with an override."""

    def lookup_object(self, index):
        return super().lookup_object(index)


@pytest.mark.parametrize(
    ("kind", "methods"),
    [
        (stock.DefaultSavePlanner, engine_choice._SAVE_PLANNER),
        (dcp.DefaultSavePlanner, engine_choice._SAVE_PLANNER),
        (stock.DefaultLoadPlanner, engine_choice._LOAD_PLANNER),
        (dcp.DefaultLoadPlanner, engine_choice._LOAD_PLANNER),
        (stock.FileSystemWriter, engine_choice._WRITER),
        (dcp.FileSystemWriter, engine_choice._WRITER),
        (stock.FileSystemReader, engine_choice._READER),
        (dcp.FileSystemReader, engine_choice._READER),
    ],
)
def test_overrides_are_detected_on_the_class_and_on_the_instance(tmp_path, kind, methods):
    storage = kind.__name__.startswith("File")
    decide = (
        engine_choice.engine_loads if kind.__name__.endswith(("LoadPlanner", "Reader")) else None
    )
    decide = decide or engine_choice.engine_saves
    planner, files = dcp.DefaultSavePlanner(), dcp.FileSystemWriter(tmp_path)
    if decide is engine_choice.engine_loads:
        planner, files = dcp.DefaultLoadPlanner(), dcp.FileSystemReader(tmp_path)

    def plain(kind: type) -> tuple[object, bool]:
        one = kind(tmp_path) if storage else kind()
        return one, decide(planner, one) if storage else decide(one, files)

    for method in (name for name in methods if hasattr(kind, name)):
        inner = getattr(kind, method)
        assert plain(type("Same", (kind,), {}))[1]
        assert plain(type("Same", (kind,), {method: inner}))[1]
        own = type(
            "Own", (kind,), {method: lambda *args, inner=inner, **more: inner(*args, **more)}
        )
        assert not plain(own)[1], method
        one, was = plain(kind)
        assert was
        setattr(one, method, lambda *args, **more: None)
        assert not (decide(planner, one) if storage else decide(one, files)), method


def test_every_method_of_the_planner_protocol_is_checked_for_overrides():
    """Methods that a release adds to the default planners must be checked, too."""
    known = {
        *engine_choice._SAVE_PLANNER,
        *engine_choice._LOAD_PLANNER,
        *engine_choice._WRITER,
        *engine_choice._READER,
    }
    harmless = {"reset", "validate_checkpoint_id", "checkpoint_id"}
    staging = {"stage", "should_synchronize_after_execute", "synchronize_staging", "close"}
    for kind in (
        stock.DefaultSavePlanner,
        stock.DefaultLoadPlanner,
        stock.FileSystemReader,
        *stock.FileSystemWriter.__mro__[:2],
    ):
        own = {name for name in vars(kind) if not name.startswith("_") or name[1:2] != "_"}
        methods = {name for name in own if callable(getattr(kind, name))}
        assert methods - {"_abc_impl"} <= known | harmless | staging, kind


def test_a_registry_of_the_users_own_is_used(tmp_path):
    registry = ExtensionRegistry()
    reader = stock.FileSystemReader(tmp_path, _extension_registry=registry)
    assert engine_choice.engine_loads(dcp.DefaultLoadPlanner(), reader)
    registry.register(Xor)
    assert not engine_choice.engine_loads(dcp.DefaultLoadPlanner(), reader)


def test_a_call_with_only_a_path_uses_the_engine_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(planner_protocol, "_Steps", None)
    dcp.save({"n": 1}, checkpoint_id=tmp_path)
    loaded = {"n": 0}
    dcp.load(loaded, checkpoint_id=tmp_path)
    assert loaded == {"n": 1}


# --- what need not be picklable ------------------------------------------------------------------


def test_objects_that_stay_in_one_process_need_not_be_picklable(tmp_path):
    class Planner(stock.DefaultSavePlanner):
        def create_local_plan(self):
            plan = super().create_local_plan()
            self.note = lambda: None
            return replace(plan, storage_data=None, planner_data=plan.planner_data)

        def create_global_plan(self, all_plans):
            plans, metadata = super().create_global_plan(all_plans)
            return [replace(plan, planner_data=lambda: None) for plan in plans], metadata

    dcp.save({"w": torch.arange(3)}, checkpoint_id=tmp_path, planner=Planner())
    assert sk.open(tmp_path).read("w").tolist() == [0, 1, 2]


def test_a_planner_for_torch_2_3_gets_a_warning_that_says_what_to_add(tmp_path):
    made = knows_only_the_old_signature(stock, str(tmp_path), 0, 1)
    with pytest.warns(UserWarning, match="set_up_planner has no parameter storage_meta; add it"):
        dcp.save(made.state, checkpoint_id=tmp_path, **made.saving)


def test_a_coordinator_that_is_not_the_first_rank(gloo, tmp_path):
    """Plans are in the order of the ranks, and `rank` is the rank in the group."""
    ends = gloo.run("support.dcp_custom:with_another_coordinator", str(tmp_path), size=4)
    assert ends == [
        (rank, rank == 2, [[0], [1], [2], [3]] if rank == 2 else None) for rank in range(4)
    ]
