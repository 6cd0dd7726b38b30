"""Planners as users write them against torch; see `dcp_custom`."""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import (
    create_default_local_load_plan,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties
from torch.distributed.checkpoint.planner import (
    WriteItemType,
)
from torch.distributed.checkpoint.utils import find_state_dict_object

import shardkeep.dcp as dcp
from support.dcp_custom_case import Base, Made, apply, case, cleared, local, state
from support.dcp_custom_storage import folder_storage
from support.scenarios import equal, values

# --- planners that extend the default ones -------------------------------------------------------


@case
def casts_on_save(base: Base, path: str, rank: int, size: int) -> Made:
    """Store floating-point tensors as bfloat16 (`transform_object`), in half the bytes."""

    class Planner(base.DefaultSavePlanner):
        def create_local_plan(self):
            plan = super().create_local_plan()
            items = [
                replace(item, tensor_data=self.halved(item.tensor_data)) for item in plan.items
            ]
            self.plan = replace(plan, items=items)
            return self.plan

        def halved(self, data):
            if data is None or not data.properties.dtype.is_floating_point:
                return data
            return replace(data, properties=TensorProperties(dtype=torch.bfloat16))

        def transform_object(self, write_item, object):
            object = super().transform_object(write_item, object)
            if isinstance(object, torch.Tensor) and object.is_floating_point():
                return object.to(torch.bfloat16)
            return object

    def halve(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.bfloat16().to(tensor.dtype) if tensor.is_floating_point() else tensor

    made = state(rank, size)
    return Made(made, {"planner": Planner()}, {}, expected=apply(made, halve))


@case
def looks_up_elsewhere(base: Base, path: str, rank: int, size: int) -> Made:
    """Write values that the state does not hold (`lookup_object`), such as averaged weights."""
    average = torch.full((6,), 0.25)

    class Planner(base.DefaultSavePlanner):
        def lookup_object(self, index):
            return average if index.fqn == "skipped" else super().lookup_object(index)

    made = state(rank, size)
    return Made(made, {"planner": Planner()}, {}, expected={**made, "skipped": average})


@case
def filters_names(base: Base, path: str, rank: int, size: int) -> Made:
    """Leave some tensors out of the checkpoint (`create_local_plan`)."""

    class Planner(base.DefaultSavePlanner):
        def create_local_plan(self):
            plan = super().create_local_plan()
            items = [item for item in plan.items if item.index.fqn != "skipped"]
            self.plan = replace(plan, items=items)
            return self.plan

    made = state(rank, size)
    del (kept := dict(made))["skipped"]

    def then() -> None:
        names = stock.FileSystemReader(path).read_metadata().state_dict_metadata
        assert "skipped" not in names
        assert "model.sharded" in names

    return Made(made, {"planner": Planner()}, {}, cleared(kept), kept, then)


@dataclass
class MoreMetadata(Metadata):
    """Metadata with an additional field of a project."""

    project: dict[str, Any] = field(default_factory=dict)


@case
def adds_to_the_metadata(base: Base, path: str, rank: int, size: int) -> Made:
    """Store a project's own data from all ranks in the metadata (Megatron's `mcore_data`)."""

    class Planner(base.DefaultSavePlanner):
        def create_local_plan(self):
            plan = super().create_local_plan()
            return replace(plan, planner_data={**plan.planner_data, f"extra{rank}": ("x", rank)})

        def create_global_plan(self, all_plans):
            plans, metadata = super().create_global_plan(all_plans)
            metadata.mcore_data = {"ranks": len(all_plans)}
            self.metadata = metadata
            return plans, metadata

    class Reading(base.DefaultLoadPlanner):
        def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
            super().set_up_planner(state_dict, metadata, is_coordinator)
            self.found = metadata.mcore_data

    reading = Reading()

    def then() -> None:
        assert reading.found == {"ranks": size}
        data = stock.FileSystemReader(path).read_metadata().planner_data
        assert [data[f"extra{number}"] for number in range(size)] == [
            ("x", number) for number in range(size)
        ]

    return Made(state(rank, size), {"planner": Planner()}, {"planner": reading}, then=then)


@case
def has_metadata_of_its_own(base: Base, path: str, rank: int, size: int) -> Made:
    """Use a subclass of `Metadata` with storage that keeps it."""

    class Planner(base.DefaultSavePlanner):
        def create_global_plan(self, all_plans):
            plans, metadata = super().create_global_plan(all_plans)
            self.metadata = MoreMetadata(**vars(metadata), project={"name": "mine"})
            return plans, self.metadata

    class Reading(base.DefaultLoadPlanner):
        def create_local_plan(self):
            assert type(self.metadata) is MoreMetadata
            assert self.metadata.project == {"name": "mine"}
            return super().create_local_plan()

    writer, reader = folder_storage(base, path)
    return Made(
        state(rank, size),
        {"planner": Planner(), "storage_writer": writer},
        {"planner": Reading(), "storage_reader": reader},
    )


@case
def balances_replicas_itself(base: Base, path: str, rank: int, size: int) -> Made:
    """Assign the writers in `create_global_plan`: the last rank writes all replicas."""

    class Planner(base.DefaultSavePlanner):
        def create_global_plan(self, all_plans):
            last: dict[Any, int] = {}
            for number, plan in enumerate(all_plans):
                last.update((item.index, number) for item in plan.items)
            kept = [
                replace(plan, items=[item for item in plan.items if last[item.index] == number])
                for number, plan in enumerate(all_plans)
            ]
            plans, metadata = super().create_global_plan(kept)
            assert all(
                item.index.fqn != "model.w" for plan in plans[: size - 1] for item in plan.items
            )
            return plans, metadata

    return Made(state(rank, size), {"planner": Planner()}, {})


@case
def renames_keys(base: Base, path: str, rank: int, size: int) -> Made:
    """Add a prefix on saving and on loading: the first example of torch's page on planners."""

    class Planner(base.DefaultSavePlanner):
        def set_up_planner(self, state_dict, storage_meta, is_coordinator):
            renamed = {"foo_" + name: value for name, value in state_dict.items()}
            super().set_up_planner(renamed, storage_meta, is_coordinator)

    class Reading(base.DefaultLoadPlanner):
        def set_up_planner(self, state_dict, metadata, is_coordinator):
            self.given = state_dict
            renamed = {"foo_" + name: value for name, value in state_dict.items()}
            super().set_up_planner(renamed, metadata, is_coordinator)

        def load_bytes(self, read_item, value):
            super().load_bytes(read_item, value)
            for name, value in self.original_state_dict.items():
                self.given[name.removeprefix("foo_")] = value

    return Made(state(rank, size), {"planner": Planner()}, {"planner": Reading()})


@case
def loads_through_a_buffer(base: Base, path: str, rank: int, size: int) -> Made:
    """Load tensors into a buffer of another dtype, and copy them in `commit_tensor`."""

    class Reading(base.DefaultLoadPlanner):
        def resolve_tensor(self, read_item):
            return torch.empty_like(super().resolve_tensor(read_item), dtype=torch.float64)

        def commit_tensor(self, read_item, tensor):
            super().resolve_tensor(read_item).copy_(tensor / 2)

    made = state(rank, size)
    made["model"]["w"] = values("w", (3, 5), torch.int16).float()
    return Made(made, {}, {"planner": Reading()}, expected=apply(made, lambda tensor: tensor / 2))


@case
def transforms_what_it_loads_into(base: Base, path: str, rank: int, size: int) -> Made:
    """Return other memory from `transform_tensor`, and copy from it in `commit_tensor`."""

    class Reading(base.DefaultLoadPlanner):
        def transform_tensor(self, read_item, tensor):
            return torch.empty_like(super().transform_tensor(read_item, tensor))

        def commit_tensor(self, read_item, tensor):
            found = self.lookup_tensor(read_item.dest_index)
            super().transform_tensor(read_item, found).copy_(tensor)

    return Made(state(rank, size), {}, {"planner": Reading()})


@case
def loads_a_part(base: Base, path: str, rank: int, size: int) -> Made:
    """Skip names that the checkpoint lacks, and some of those that it has."""

    class Reading(base.DefaultLoadPlanner):
        def create_local_plan(self):
            plan = super().create_local_plan()
            return replace(plan, items=[i for i in plan.items if i.dest_index.fqn != "skipped"])

    made = state(rank, size)
    template = {**cleared(made), "new": torch.full((2,), 9.0), "skipped": torch.full((6,), 5.0)}
    expected = {**made, "new": template["new"].clone(), "skipped": template["skipped"].clone()}
    reading = Reading(allow_partial_load=True)
    return Made(made, {}, {"planner": reading}, template, expected)


@case
def knows_only_the_old_signature(base: Base, path: str, rank: int, size: int) -> Made:
    """Use planners of torch 2.3 and older: `set_up_planner` without `storage_meta`."""

    class Planner(base.DefaultSavePlanner):
        def set_up_planner(self, state_dict, is_coordinator):
            super().set_up_planner(state_dict, is_coordinator=is_coordinator)

    return Made(state(rank, size), {"planner": Planner()}, {})


@case
def caches_its_plans(base: Base, path: str, rank: int, size: int) -> Made:
    """Use torch's plan caching with customized planners."""

    class Planner(base.DefaultSavePlanner):
        def lookup_object(self, index):
            return super().lookup_object(index)

    planner = Planner(enable_plan_caching=True)
    planner._cached_plans_key = path
    made = state(rank, size)

    def then() -> None:
        again = {**made, "skipped": torch.full((6,), 3.0)}
        dcp.save(again, checkpoint_id=f"{path}/again", planner=planner)
        loaded = cleared(again)
        dcp.load(loaded, checkpoint_id=f"{path}/again")
        assert equal(local(loaded), local(again))

    return Made(made, {"planner": planner}, {}, then=then)


# --- planners from scratch -----------------------------------------------------------------------


@case
def plans_from_scratch(base: Base, path: str, rank: int, size: int) -> Made:
    """Derive planners from the abstract classes; store tensors as float16 or unchanged."""

    class Planner(base.SavePlanner):
        def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False):
            self.state, self.mappings = flatten_state_dict(state_dict)
            self.lead = is_coordinator

        def create_local_plan(self):
            plan = create_default_local_save_plan(self.state, self.lead)
            items = [self.halved(item) for item in plan.items]
            return replace(plan, items=items, planner_data=self.mappings)

        def halved(self, item):
            if item.index.fqn != "skipped":
                return item
            properties = TensorProperties(dtype=torch.float16)
            return replace(item, tensor_data=replace(item.tensor_data, properties=properties))

        def create_global_plan(self, all_plans):
            seen: set[Any] = set()
            plans = []
            for plan in all_plans:
                items = [item for item in plan.items if item.index not in seen]
                seen.update(item.index for item in items)
                plans.append(replace(plan, items=items))
            return stock.default_planner.create_default_global_save_plan(plans)

        def finish_plan(self, new_plan):
            return new_plan

        def resolve_data(self, write_item):
            found = find_state_dict_object(self.state, write_item.index)
            if write_item.type == WriteItemType.BYTE_IO:
                data = io.BytesIO()
                torch.save(found, data)
                return data
            return found.half() if write_item.index.fqn == "skipped" else found

    class Reading(base.LoadPlanner):
        def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
            self.given, self.metadata = state_dict, metadata
            self.state, self.mappings = flatten_state_dict(state_dict)

        def create_local_plan(self):
            return create_default_local_load_plan(self.state, self.metadata)

        def create_global_plan(self, global_plan):
            return global_plan

        def finish_plan(self, central_plan):
            return central_plan

        def load_bytes(self, read_item, value):
            *outer, last = self.mappings[read_item.dest_index.fqn]
            place = self.given
            for name in outer:
                place = place[name]
            place[last] = torch.load(value, weights_only=True)

        def resolve_tensor(self, read_item):
            found = find_state_dict_object(self.state, read_item.dest_index)
            for dim, (start, length) in enumerate(
                zip(read_item.dest_offsets, read_item.lengths, strict=True)
            ):
                found = found.narrow(dim, start, length)
            return found

        def commit_tensor(self, read_item, tensor):
            pass

    return Made(state(rank, size), {"planner": Planner()}, {"planner": Reading()})
