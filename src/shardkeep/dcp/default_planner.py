"""The default planners: torch's own, for those who build on them, without their defects.

Where nothing is overridden they only carry options, and the engine plans. A class that derives from
them has everything that torch's have, called in the order that torch documents.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Collection, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint.default_planner as stock
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._sharded_tensor_utils import _flatten_sharded_tensors
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, WriteItem
from torch.distributed.checkpoint.storage import StorageReader

from shardkeep.dcp.bridge.meta_tensors import allocate_meta_tensors
from shardkeep.dcp.bridge.torch_modules import forward_to_torch
from shardkeep.dcp.bridge.trust import trusted
from shardkeep.errors import Mismatch
from shardkeep.plan.ownership import lowest, owners
from shardkeep.state import flatten
from shardkeep.torch_state.objects import from_bytes, to_bytes
from shardkeep.types import Path

__all__ = [
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "create_default_global_load_plan",
    "create_default_global_save_plan",
    "create_default_local_load_plan",
    "create_default_local_save_plan",
]

create_default_global_load_plan = stock.create_default_global_load_plan
create_default_global_save_plan = stock.create_default_global_save_plan
create_default_local_load_plan = stock.create_default_local_load_plan
create_default_local_save_plan = stock.create_default_local_save_plan
__getattr__ = forward_to_torch("default_planner")

_CACHES_PLANS = "enable_plan_caching" in inspect.signature(stock.DefaultSavePlanner).parameters


class DefaultSavePlanner(stock.DefaultSavePlanner):
    """Torch's default planner; see there for the options.

    Replicas are balanced over the ranks by the bytes of their shards, not of their whole tensors.
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        dedup_replicated_tensors: bool | None = None,
        dedup_save_to_lowest_rank: bool = False,
        enable_plan_caching: bool = False,
    ) -> None:
        # Releases that keep no plans plan each time: slower, with the same outcome.
        options: dict[str, Any] = {"enable_plan_caching": enable_plan_caching}
        super().__init__(
            flatten_state_dict,
            flatten_sharded_tensors,
            dedup_replicated_tensors,
            dedup_save_to_lowest_rank,
            **(options if _CACHES_PLANS else {}),
        )

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state to save."""
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        if not self.flatten_state_dict:
            self.state_dict = _as_it_is(state_dict, self.state_dict)

    def create_local_plan(self) -> SavePlan:
        """This rank's plan; an unusable one where the coordinator has it from an earlier save."""
        plan = super().create_local_plan()
        if getattr(plan, "usable", True):
            return plan
        kept = self._cached_save_plan
        if kept[self._cached_plans_key] != self.plan:  # Torch compares no dtypes, and no paths.
            del kept[self._cached_plans_key]
            plan = super().create_local_plan()
        return plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """What each rank writes, and the metadata. ValueError if plans are missing or clash."""
        if not hasattr(stock.DefaultSavePlanner, "_dedup_save_plans"):  # Older releases.
            all_plans = self._dedup_save_plans(all_plans)
        return super().create_global_plan(all_plans)

    def _create_global_plan_with_caching(self, all_plans: list[SavePlan]) -> Any:
        known = self._cached_all_plans.get(self._cached_plans_key, [])
        if len(known) != len(all_plans) and not all(plan.usable for plan in all_plans):
            raise ValueError(
                f"{len(known)} plans of {self._cached_plans_key} were kept, and {len(all_plans)} "
                "ranks save: give each group of ranks a planner class of its own, or turn "
                "enable_plan_caching off"
            )
        return super()._create_global_plan_with_caching(all_plans)

    def _finish_plan_with_caching(self, new_plan: SavePlan) -> SavePlan:
        finished = super()._finish_plan_with_caching(new_plan)
        if new_plan.usable or new_plan.storage_data is None:
            return finished
        # What to write is kept, but where to is the writer's to say, for each save anew.
        return replace(finished, storage_data=new_plan.storage_data)

    def _dedup_save_plans(self, all_plans: list[SavePlan]) -> list[SavePlan]:
        return _without_repeats(all_plans, to_lowest=self.dedup_save_to_lowest_rank)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """An object as it is stored. Raises Conflict, naming it, if it can't be."""
        if write_item.type.name == "BYTE_IO":
            return io.BytesIO(to_bytes(object, name=write_item.index.fqn))
        return object


def _as_it_is(state: Mapping[Any, Any], made: Mapping[Any, Any]) -> dict[str, Any]:
    """The values at the top of a state, but the tensors that torch made of them.

    It copies all containers, for the sake of nested ShardedTensors: with other keys and types.
    """
    named = {str(key): value for key, value in made.items()}
    return {
        str(key): named[str(key)] if isinstance(value, torch.Tensor) else value
        for key, value in state.items()
        if str(key) in named or not isinstance(value, torch.Tensor)
    }


def _without_repeats(plans: list[SavePlan], *, to_lowest: bool) -> list[SavePlan]:
    """The plans with each item in one of them only: by load, or in the first that has it.

    Items are the same if they have one index; shards, if they have one size, too: an empty one
    may claim the offsets of another.
    """
    items = [item for plan in plans for item in plan.items]
    counts = [len(plan.items) for plan in plans]
    numbers: dict[Any, int] = {}
    keys = [numbers.setdefault(_identity(item), len(numbers)) for item in items]
    key = np.array(keys, dtype=np.int64)
    rank = np.repeat(np.arange(len(plans), dtype=np.int64), counts)
    if to_lowest:
        chosen = lowest(key, rank)
    else:
        largest = np.zeros(len(numbers), dtype=np.int64)
        np.maximum.at(largest, key, np.array([_nbytes(item) for item in items], dtype=np.int64))
        chosen = owners(key, rank, largest[key])
    kept = iter(chosen.tolist())
    return [replace(plan, items=[item for item in plan.items if next(kept)]) for plan in plans]


def _identity(item: WriteItem) -> Any:
    data = item.tensor_data
    if data is None or item.type.name != "SHARD":
        return item.index
    return item.index, data.chunk.sizes


def _nbytes(item: WriteItem) -> int:
    """Bytes of an item's own shard; of an object, what the plan says of it, or 0."""
    data = item.tensor_data
    if data is None:
        return int(getattr(getattr(item, "bytes_io_data", None), "nbytes", 0))
    return prod(data.chunk.sizes) * int(data.properties.dtype.itemsize)


class DefaultLoadPlanner(stock.DefaultLoadPlanner):
    """Torch's default planner; see there for the options.

    Objects of classes that are not known to be safe raise `Untrusted`. Values go under the very
    keys that the state has, flattened or not.
    """

    _reader: StorageReader

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
    ) -> None:
        super().__init__(flatten_state_dict, flatten_sharded_tensors, allow_partial_load)
        self._keys: dict[int, dict[str, Any]] = {}
        """Of containers, by their `id`: the keys that are not strings, by what they are as such."""

    @cached_property  # Set, in steps, as an attribute: mypy takes it for a property without setter.
    def metadata(self) -> Metadata | None:  # type: ignore[override]
        """What the checkpoint holds: where the engine loads, read when it is asked for."""
        return self._reader.read_metadata()

    def read_from(self, reader: StorageReader) -> None:
        """Say whose metadata `metadata` is, without reading it."""
        vars(self).pop("metadata", None)
        self._reader = reader

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state to fill, and what the checkpoint holds."""
        if metadata is not None and self.flatten_state_dict:
            metadata = without_legacy_duplicates(metadata)
        allocate_meta_tensors(state_dict)
        self._keys.clear()
        self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator
        if self.flatten_sharded_tensors:
            state_dict = _flatten_sharded_tensors(state_dict)
        if self.flatten_state_dict:
            self.state_dict, self.mappings = flatten_state_dict(state_dict)
        else:
            self.state_dict = _as_it_is(self.original_state_dict, state_dict)

    def create_local_plan(self) -> LoadPlan:
        """What this rank reads. RuntimeError or ValueError if names or sizes do not match."""
        metadata = self.metadata
        if metadata is None or not all(n in metadata.state_dict_metadata for n in self.state_dict):
            return super().create_local_plan()  # Looks for the names of torch 2.3, too.
        return create_default_local_load_plan(self.state_dict, metadata)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put an object where the state has it."""
        name = read_item.dest_index.fqn
        value.seek(0)
        loaded = from_bytes(value.read(), name=name, trust=trusted())
        if self.flatten_state_dict:
            self._put(self.mappings[name], loaded)
            return
        self.state_dict[name] = loaded
        # Torch's own leaves the caller's state as it was.
        (key,) = self._path((name,))
        held = self.original_state_dict.get(key)
        self.original_state_dict[key] = _poured(loaded, held)

    def _put(self, path: Path, value: Any) -> None:
        typed = self._path(path)
        if isinstance(value, Mapping):  # Whole, as torch 2.3 has those without tensors.
            with suppress(Mismatch):
                value = _poured(value, flatten.get(self.original_state_dict, typed))
        flatten.put(self.original_state_dict, typed, value)

    def _path(self, path: Path) -> Path:
        """A path of torch's, where keys are strings, with the keys that the state has."""
        found, holder = [], self.original_state_dict
        for part in path:
            key = part
            if isinstance(holder, Mapping) and part not in holder:
                if id(holder) not in self._keys:
                    self._keys[id(holder)] = {str(k): k for k in holder if not isinstance(k, str)}
                key = self._keys[id(holder)].get(part, part)
            found.append(key)
            try:
                holder = holder[key]
            except (LookupError, TypeError):  # Nothing is there yet: `put` makes it, or says so.
                holder = {}
        return tuple(found)


def _poured(value: Any, held: Any) -> Any:
    """`value`, in the containers and tensors of `held` where they are alike.

    A model's tensors are filled so, as they are where the state is flattened.
    """
    if isinstance(held, torch.Tensor) and isinstance(value, torch.Tensor):
        if (held.shape, held.layout) != (value.shape, value.layout):
            return value
        with torch.no_grad():
            held.copy_(value)
    elif isinstance(held, MutableMapping) and isinstance(value, Mapping):
        named = {str(key): inner for key, inner in value.items()}  # Torch makes strings of them.
        if {str(key) for key in held} != named.keys():
            return value
        for key in held:
            held[key] = _poured(named[str(key)], held[key])
    elif type(held) is type(value) is list and len(held) == len(value):
        held[:] = [_poured(new, old) for new, old in zip(value, held, strict=True)]
    else:
        return value
    return held


def without_legacy_duplicates(metadata: Metadata) -> Metadata:
    """The metadata without the objects whose leaves are there as well, for torch 2.3 and older."""
    paths = _paths(metadata)
    outer = {path[:depth] for path in paths.values() for depth in range(1, len(path))}
    entries = metadata.state_dict_metadata
    left = {
        name: entry
        for name, entry in entries.items()
        if not isinstance(entry, BytesStorageMetadata) or paths.get(name) not in outer
    }
    return metadata if len(left) == len(entries) else replace(metadata, state_dict_metadata=left)


def _paths(metadata: Metadata) -> Mapping[str, Path]:
    """Where names were in the state, if a default planner has saved it."""
    paths = metadata.planner_data
    return paths if isinstance(paths, Mapping) else {}


class _EmptyStateDictLoadPlanner(DefaultLoadPlanner):
    """Fills an empty state with all that the checkpoint holds, nested as it was saved.

    Tensors come whole, on the CPU. Metadata does not tell which keys were integers: they are
    strings.

    Args:
        keys: flat names to load, or those of containers around them; by default all.
    """

    def __init__(self, keys: Collection[str] | None = None, *args: Any, **kwargs: Any) -> None:
        self.keys = keys
        super().__init__(*args, **kwargs)

    def _should_include_key(self, key: str, metadata: Metadata) -> bool:
        path = _paths(metadata).get(key, (key,))
        around = {".".join(map(str, path[:depth])) for depth in range(1, len(path) + 1)}
        return self.keys is None or any(name in self.keys for name in {key, *around})

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Make room in the state for all that is to be loaded.

        Raises:
            ValueError: the state is not empty, or there is no metadata.
        """
        if state_dict:
            raise ValueError("give an empty state: it is made from what the checkpoint holds")
        if metadata is None:
            raise ValueError("without metadata nothing says what the checkpoint holds")
        if self.flatten_state_dict:
            metadata = without_legacy_duplicates(metadata)
        paths = _paths(metadata) if self.flatten_state_dict else {}
        wanted = metadata.state_dict_metadata.items()
        flat = {name: _room(e) for name, e in wanted if self._should_include_key(name, metadata)}
        mappings = {name: paths.get(name, (name,)) for name in flat}
        for name, path in mappings.items():
            set_element(state_dict, path, flat[name])
        super().set_up_planner(state_dict, metadata, is_coordinator)
        # Not as flattened again: a list that has lost its tensors to `keys` would be one leaf.
        self.state_dict, self.mappings = flat, mappings


def _room(entry: Any) -> Any:
    """Memory for a tensor. An object's place has to be taken, by anything."""
    if isinstance(entry, TensorStorageMetadata):
        return torch.empty(entry.size, dtype=entry.properties.dtype)
    return None
