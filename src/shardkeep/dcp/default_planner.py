"""The default planners: subclasses of torch's, without some of their defects.

If nothing is overridden, they only hold options, and the engine plans. Subclasses have all methods
of torch's planners, which are called in the order that torch documents.
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
    """Plans a save; a subclass of torch's default planner.

    Replicas are balanced over the ranks by the bytes of their shards, not of their whole tensors.

    Args:
        flatten_state_dict: save each leaf of the nested state under a name of its own. False saves
            each top-level value as one item.
        flatten_sharded_tensors: save the inner tensors of nested ShardedTensors.
        dedup_replicated_tensors: accepted as in torch, and ignored: replicas are saved once.
        dedup_save_to_lowest_rank: the lowest rank that holds a replica writes it; otherwise the
            ranks that hold replicas share them.
        enable_plan_caching: reuse plans from save to save, if a subclass makes plans.

    Example:
        >>> planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        >>> dcp.save(state, checkpoint_id="run/step_100", planner=planner)
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        dedup_replicated_tensors: bool | None = None,
        dedup_save_to_lowest_rank: bool = False,
        enable_plan_caching: bool = False,
    ) -> None:
        # Older releases have no such option: they plan every save, with the same result.
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
        """Take the state to save.

        Args:
            state_dict: the state.
            storage_meta: what the writer says of the save.
            is_coordinator: whether this rank combines the plans.
        """
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        if not self.flatten_state_dict:
            self.state_dict = _unflattened(state_dict, self.state_dict)

    def create_local_plan(self) -> SavePlan:
        """Return this rank's plan.

        If the coordinator has kept an equal plan from an earlier save, an empty one that says so.
        """
        plan = super().create_local_plan()
        if getattr(plan, "usable", True):
            return plan
        kept = self._cached_save_plan
        if kept[self._cached_plans_key] != self.plan:  # Torch compares neither dtypes nor paths.
            del kept[self._cached_plans_key]
            plan = super().create_local_plan()
        return plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return what each rank writes, and the metadata.

        Args:
            all_plans: the plans of all ranks.

        Raises:
            ValueError: plans contradict each other, or a plan that was to be kept is missing.
        """
        if not hasattr(stock.DefaultSavePlanner, "_dedup_save_plans"):  # Older releases.
            all_plans = self._dedup_save_plans(all_plans)
        return super().create_global_plan(all_plans)

    def _create_global_plan_with_caching(self, all_plans: list[SavePlan]) -> Any:
        known = self._cached_all_plans.get(self._cached_plans_key, [])
        if len(known) != len(all_plans) and not all(plan.usable for plan in all_plans):
            raise ValueError(
                f"{self._cached_plans_key} has kept {len(known)} plans of an earlier save, but "
                f"{len(all_plans)} ranks save now: use a planner class of its own for each group "
                "of ranks, or turn enable_plan_caching off"
            )
        return super()._create_global_plan_with_caching(all_plans)

    def _finish_plan_with_caching(self, new_plan: SavePlan) -> SavePlan:
        finished = super()._finish_plan_with_caching(new_plan)
        if new_plan.usable or new_plan.storage_data is None:
            return finished
        # The items of a kept plan are valid, but the writer names the files of each save anew.
        return replace(finished, storage_data=new_plan.storage_data)

    def _dedup_save_plans(self, all_plans: list[SavePlan]) -> list[SavePlan]:
        return _deduplicated(all_plans, to_lowest=self.dedup_save_to_lowest_rank)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """Return an object as the bytes to store.

        Args:
            write_item: the item of the plan.
            object: the object; a tensor is returned as it is.

        Raises:
            Conflict: the object can't be stored; the message names it.
        """
        if write_item.type.name == "BYTE_IO":
            return io.BytesIO(to_bytes(object, name=write_item.index.fqn))
        return object


def _unflattened(state: Mapping[Any, Any], made: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the top-level values of a state, with the tensors that torch has made of some.

    Torch copies all containers to flatten nested ShardedTensors, and changes their keys and types.

    Args:
        state: the caller's state.
        made: what torch has made of it.
    """
    named = {str(key): value for key, value in made.items()}
    return {
        str(key): named[str(key)] if isinstance(value, torch.Tensor) else value
        for key, value in state.items()
        if str(key) in named or not isinstance(value, torch.Tensor)
    }


def _deduplicated(plans: list[SavePlan], *, to_lowest: bool) -> list[SavePlan]:
    """Return the plans with each item in only one of them.

    Items are equal if their indices are; shards only if their sizes are equal, too, since an empty
    shard may have the offsets of another one.

    Args:
        plans: the plans of all ranks.
        to_lowest: keep an item in the first plan that has it, instead of balancing the bytes.
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
    """Return the bytes of an item's shard; of an object, as the plan says, or 0."""
    data = item.tensor_data
    if data is None:
        return int(getattr(getattr(item, "bytes_io_data", None), "nbytes", 0))
    return prod(data.chunk.sizes) * int(data.properties.dtype.itemsize)


class DefaultLoadPlanner(stock.DefaultLoadPlanner):
    """Plans a load; a subclass of torch's default planner.

    Objects of classes that are neither safe nor trusted raise `Untrusted`. Keys of the state that
    are not strings are kept.

    Args:
        flatten_state_dict: load each leaf of the nested state by a name of its own, as saved.
        flatten_sharded_tensors: load the inner tensors of nested ShardedTensors.
        allow_partial_load: leave values unchanged whose names the checkpoint lacks, instead of
            raising an error.

    Example:
        >>> planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        >>> dcp.load(state, checkpoint_id="run/step_100", planner=planner)
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
        """`id` of a container -> its keys that are not strings, by their text."""

    @cached_property  # `set_up_planner` sets it, which mypy does not expect of a property.
    def metadata(self) -> Metadata | None:  # type: ignore[override]
        """The metadata of the checkpoint; after a load by the engine, read on first use."""
        return self._reader.read_metadata()

    def read_from(self, reader: StorageReader) -> None:
        """Take the reader that `metadata` is read with when it is first used."""
        vars(self).pop("metadata", None)
        self._reader = reader

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state to fill, and what the checkpoint holds.

        Args:
            state_dict: the state.
            metadata: of the checkpoint.
            is_coordinator: whether this rank combines the plans.
        """
        if metadata is not None and self.flatten_state_dict:
            metadata = without_legacy_duplicates(metadata)
        allocate_meta_tensors(state_dict)
        self._keys.clear()
        self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator
        inner = _flatten_sharded_tensors(state_dict) if self.flatten_sharded_tensors else state_dict
        if self.flatten_state_dict:
            self.state_dict, self.mappings = flatten_state_dict(inner)
        else:
            self.state_dict = _unflattened(state_dict, inner)

    def create_local_plan(self) -> LoadPlan:
        """Return what this rank reads.

        Raises:
            RuntimeError: the checkpoint lacks a name.
            ValueError: a tensor has another size there.
        """
        metadata = self.metadata
        if metadata is None or not all(n in metadata.state_dict_metadata for n in self.state_dict):
            return super().create_local_plan()  # Tries the names of torch 2.3, too.
        return create_default_local_load_plan(self.state_dict, metadata)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put an object into the state.

        Args:
            read_item: the item of the plan.
            value: the bytes of the object.

        Raises:
            Untrusted: it needs a class that is not trusted.
        """
        name = read_item.dest_index.fqn
        value.seek(0)
        loaded = from_bytes(value.read(), name=name, trust=trusted())
        if self.flatten_state_dict:
            self._put(self.mappings[name], loaded)
            return
        self.state_dict[name] = loaded
        # Torch's planner does not change the caller's state here.
        (key,) = self._path((name,))
        held = self.original_state_dict.get(key)
        self.original_state_dict[key] = _copied_into(loaded, held)

    def _put(self, path: Path, value: Any) -> None:
        typed = self._path(path)
        if isinstance(value, Mapping):  # Torch 2.3 saves mappings without tensors as one object.
            with suppress(Mismatch):
                value = _copied_into(value, flatten.get(self.original_state_dict, typed))
        flatten.put(self.original_state_dict, typed, value)

    def _path(self, path: Path) -> Path:
        """Return a path of torch's, whose keys are all strings, with the keys of the state."""
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
            except (LookupError, TypeError):  # Not in the state; `put` creates it or raises.
                holder = {}
        return tuple(found)


def _copied_into(value: Any, held: Any) -> Any:
    """Return `value`, copied into the containers and tensors of `held` where they are alike.

    So the tensors of a model are filled in place, as they are in a flattened state.
    """
    if isinstance(held, torch.Tensor) and isinstance(value, torch.Tensor):
        if (held.shape, held.layout) != (value.shape, value.layout):
            return value
        with torch.no_grad():
            held.copy_(value)
    elif isinstance(held, MutableMapping) and isinstance(value, Mapping):
        named = {
            str(key): inner for key, inner in value.items()
        }  # Torch has turned them into strings.
        if {str(key) for key in held} != named.keys():
            return value
        for key in held:
            held[key] = _copied_into(named[str(key)], held[key])
    elif type(held) is type(value) is list and len(held) == len(value):
        held[:] = [_copied_into(new, old) for new, old in zip(value, held, strict=True)]
    else:
        return value
    return held


def without_legacy_duplicates(metadata: Metadata) -> Metadata:
    """Return metadata without the duplicate entries for torch 2.3 and older.

    Such an entry is an object whose leaves have entries of their own.
    """
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
    """Return the path of each name in the state, if a default planner has saved it."""
    paths = metadata.planner_data
    return paths if isinstance(paths, Mapping) else {}


class _EmptyStateDictLoadPlanner(DefaultLoadPlanner):
    """Fills an empty state with what the checkpoint holds, nested as it was saved.

    Tensors are loaded in full, to the CPU. Integer keys become strings, as metadata does not
    distinguish them.

    Args:
        keys: flat names, or names of containers; by default all.
    """

    def __init__(self, keys: Collection[str] | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keys = keys

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
        """Allocate tensors in the state for all that is to be loaded.

        Raises:
            ValueError: the state is not empty, or `metadata` is None.
        """
        if state_dict:
            raise ValueError("the state must be empty: it is filled with what the checkpoint holds")
        if metadata is None:
            raise ValueError("metadata must not be None: it says what the checkpoint holds")
        if self.flatten_state_dict:
            metadata = without_legacy_duplicates(metadata)
        paths = _paths(metadata) if self.flatten_state_dict else {}
        wanted = metadata.state_dict_metadata.items()
        flat = {
            name: _allocated(e) for name, e in wanted if self._should_include_key(name, metadata)
        }
        mappings = {name: paths.get(name, (name,)) for name in flat}
        for name, path in mappings.items():
            set_element(state_dict, path, flat[name])
        super().set_up_planner(state_dict, metadata, is_coordinator)
        # Flattening again would make one leaf of a list whose tensors are not among `keys`.
        self.state_dict, self.mappings = flat, mappings


def _allocated(entry: Any) -> Any:
    """Return memory for a tensor, or None as a placeholder for an object."""
    if isinstance(entry, TensorStorageMetadata):
        return torch.empty(entry.size, dtype=entry.properties.dtype)
    return None
