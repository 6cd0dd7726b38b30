"""Planners and storage as users write them against torch, in the patterns of real projects.

Each case derives them from a base, `torch.distributed.checkpoint` or `shardkeep.dcp`, and runs them
with both engines. Both must make the same calls and load the same values.
"""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    WriteItem,
)

import shardkeep.dcp as dcp
from support import dcp_custom_planners, dcp_custom_storage  # noqa: F401 - they hold the cases
from support.dcp_custom_case import BASES, CASES, cleared, local, state
from support.scenarios import equal

# --- running them --------------------------------------------------------------------------------

CALLS = {
    "planner": "set_up_planner create_local_plan create_global_plan finish_plan resolve_data "
    "load_bytes resolve_tensor commit_tensor",
    "storage": "reset set_up_storage_writer set_up_storage_reader prepare_local_plan "
    "prepare_global_plan write_data read_data finish read_metadata storage_meta",
}
Log = list[tuple[Any, ...]]


def watch(watched: Any, kind: str, log: Log) -> None:
    """Record every documented call of an object in the log, with a description of its arguments."""

    def note(name: str) -> None:
        method = getattr(watched, name)

        @wraps(method)
        def noting(*args: Any, **kwargs: Any) -> Any:
            log.append((kind, name, *map(brief, args), *sorted(shown(kwargs))))
            return method(*args, **kwargs)

        setattr(watched, name, noting)

    for name in CALLS[kind].split():
        if hasattr(watched, name):
            note(name)


def shown(kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, brief(value)) for name, value in kwargs.items()]


def brief(value: Any) -> Any:
    """Return a description of a value that is the same in every run."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, list):
        return [brief(one) for one in value]
    if isinstance(value, SavePlan | LoadPlan):
        return type(value).__name__, [brief(item) for item in value.items]
    if isinstance(value, WriteItem):
        return value.index.fqn, tuple(value.index.offset or ())
    if isinstance(value, ReadItem):
        return value.storage_index.fqn, tuple(value.storage_index.offset or ())
    return type(value).__name__


def sorted_runs(log: Log) -> Log:
    """Return the log with the items of each `write_data` and `read_data` sorted.

    Storage may process items in any order.
    """
    several = ("resolve_data", "load_bytes", "resolve_tensor", "commit_tensor")
    result: Log = []
    run: Log = []
    for call in [*log, ("", "")]:
        if call[1] in several:
            run.append(call)
            continue
        result += sorted(run, key=repr)
        run = []
        result.append(call)
    return result[:-1]


def run(rank: int, size: int, name: str, base: str, path: str) -> Log:
    """Save and load with both engines; return the log, which must be the same for both."""
    logs: dict[str, Log] = {}
    for engine_name, engine in BASES.items():
        place = f"{path}/{engine_name}"
        made = CASES[name](BASES[base], place, rank, size)
        log = logs[engine_name] = []
        if name != "has_a_file_system_of_its_own":  # There the engine may work alone.
            for given in [*made.saving.values(), *made.loading.values()]:
                kind = "planner" if hasattr(given, "finish_plan") else "storage"
                watch(given, kind, log)
        if "storage_writer" not in made.saving:
            made.saving["checkpoint_id"] = place
        if "storage_reader" not in made.loading:
            made.loading["checkpoint_id"] = place
        # If only the load is customized, both engines load a checkpoint of stock torch.
        saver = engine if len(made.saving) > ("checkpoint_id" in made.saving) else stock
        saver.save(made.state, **made.saving)
        barrier()
        template = cleared(made.state) if made.template is None else made.template
        engine.load(template, **made.loading)
        expected = made.state if made.expected is None else made.expected
        assert equal(local(template), local(expected)), (engine_name, template, expected)
        made.then()
        barrier()
    assert sorted_runs(logs["stock"]) == sorted_runs(logs["ours"])
    return logs["ours"]


def run_all(rank: int, size: int, name: str, path: str) -> Log:
    """Run a case with the classes of both bases; return the joined logs."""
    return [call for base in BASES for call in run(rank, size, name, base, f"{path}/{base}")]


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def order(rank: int, size: int, path: str) -> Log:
    """Return the calls that a save and a load make of stock planners and storage."""
    log: Log = []
    made = state(rank, size)
    planner, reading = stock.DefaultSavePlanner(), stock.DefaultLoadPlanner()
    writer, reader = stock.FileSystemWriter(path), stock.FileSystemReader(path)
    for planning in (planner, reading):
        watch(planning, "planner", log)
    for storage in (writer, reader):
        watch(storage, "storage", log)
    dcp.save(made, storage_writer=writer, planner=planner)
    # `finish` calls `storage_meta` once more.
    log[:] = [call for n, call in enumerate(log) if call[1] != "storage_meta" or n == 0]
    loaded = cleared(made)
    dcp.load(loaded, storage_reader=reader, planner=reading)
    assert equal(local(loaded), local(made))
    return log


def with_another_coordinator(rank: int, size: int, path: str) -> tuple[Any, ...]:
    """Return the rank, the coordinator, and the ranks of the plans that it received, in order."""
    seen: Any = None

    class Planner(stock.DefaultSavePlanner):
        def create_local_plan(self):
            return replace(super().create_local_plan(), storage_data=rank)

        def create_global_plan(self, all_plans):
            nonlocal seen
            seen = [[plan.storage_data] for plan in all_plans]
            plans = [replace(plan, storage_data=None) for plan in all_plans]
            return super().create_global_plan(plans)

    planner, writer = Planner(), stock.FileSystemWriter(path)
    made = state(rank, size)
    dcp.save_state_dict(made, writer, coordinator_rank=2, planner=planner)
    loaded = cleared(made)
    dcp.load(loaded, checkpoint_id=path)
    assert equal(local(loaded), local(made))
    return writer.rank, planner.is_coordinator, seen
