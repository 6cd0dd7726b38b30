"""Loading of an optimizer's state under FSDP1, without a template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.optimizer as stock
from torch._utils import _get_device_module
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.fsdp._shard_utils import _create_chunk_sharded_tensor

from shardkeep.dcp.bridge.errors import as_torch
from shardkeep.dcp.bridge.torch_modules import forward_to_torch
from shardkeep.dcp.default_planner import without_legacy_duplicates
from shardkeep.dcp.operations.load import load_state
from shardkeep.errors import Mismatch
from shardkeep.types import Path

__all__ = ["load_sharded_optimizer_state_dict"]

__getattr__ = forward_to_torch("optimizer")


def load_sharded_optimizer_state_dict(
    model_state_dict: dict[str, Any],
    optimizer_key: str,
    storage_reader: StorageReader,
    planner: LoadPlanner | None = None,
) -> dict[str, Any]:
    """Load an optimizer's state, sharded as FSDP1 expects; every rank of the job must call this.

    Each tensor is cut into chunks of rows, one for each rank. With tensor parallelism, each rank's
    slice of a parameter is cut in this way over its data-parallel group. Tensors of one element are
    loaded in full, and so is everything if there is no process group.

    Args:
        model_state_dict: the present state of the model, of the kind SHARDED_STATE_DICT.
        optimizer_key: the key of the optimizer in the saved state.
        storage_reader: reads the checkpoint.
        planner: for models without tensor parallelism; by default `DefaultLoadPlanner`.

    Returns:
        A state with that key, to be passed to `FSDP.optim_state_dict_to_load`.

    Raises:
        CheckpointException: the load failed, or the checkpoint holds no optimizer under that key.

    Example:
        >>> state = dcp.load_sharded_optimizer_state_dict(
        ...     model_state_dict=model.state_dict(),
        ...     optimizer_key="optim",
        ...     storage_reader=dcp.FileSystemReader("run/step_100"),
        ... )
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    with as_torch(rank):
        metadata = without_legacy_duplicates(storage_reader.read_metadata())
        paths = _paths_below(optimizer_key, metadata)
        slices, group = stock._get_state_dict_2d_layout(model_state_dict)
        state: dict[str, Any] = {}
        moved: dict[str, Sequence[int]] = {}
        for name, path in paths.items():
            entry = metadata.state_dict_metadata[name]
            parameter = path[2] if len(path) > 2 else ""
            offset, size = slices.get(parameter, (None, ()))
            state[name] = _allocated(entry, size, group)
            if offset is not None and isinstance(state[name], ShardedTensor):
                moved[name] = offset
    if group is not None:
        planner = stock._ReaderWithOffset(moved)
    load_state(state, storage_reader, planner=planner)
    return unflatten_state_dict(state, dict(paths))


def _paths_below(key: str, metadata: Metadata) -> dict[str, Path]:
    """Return the paths of the optimizer's names in the saved state.

    Raises:
        Mismatch: there are none.
    """
    known = metadata.planner_data or {}
    names = [name for name in metadata.state_dict_metadata if name in known]
    paths = {name: known[name] for name in names if known[name][0] == key}
    if not paths:
        raise Mismatch(
            f"the checkpoint has no flattened state under {key!r}; its top-level keys are "
            f"{sorted({str(path[0]) for path in known.values()})}"
        )
    return paths


def _allocated(entry: Any, part: Sequence[int], group: dist.ProcessGroup | None) -> Any:
    """Return memory for this rank's share of a tensor, or None as a placeholder for an object.

    Args:
        entry: of the metadata.
        part: the size of the part that the group shares; empty for the whole tensor.
        group: the group that shares it; by default the job's.
    """
    if not isinstance(entry, TensorStorageMetadata):
        return None
    if entry.size.numel() == 1 or not dist.is_initialized():
        return torch.empty(entry.size, dtype=entry.properties.dtype, device=_device(group))
    if group is None:
        # One element, expanded to the whole size: only this rank's chunk of it is allocated.
        one = torch.empty((), dtype=entry.properties.dtype, device=_device(group))
        return _create_chunk_sharded_tensor(
            one.expand(entry.size),
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            num_devices_per_node=_get_device_module(one.device.type).device_count(),
            pg=dist.distributed_c10d._get_default_group(),
        )
    spec: ChunkShardingSpec = stock._create_colwise_spec(group)
    properties = TensorProperties(dtype=entry.properties.dtype)
    layout = spec.build_metadata(torch.Size(part or entry.size), properties)
    own = layout.shards_metadata[dist.get_rank(group)]
    local = torch.empty(own.shard_sizes, dtype=properties.dtype, device=_device(group))
    shards = [Shard(local, own)]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, layout, process_group=group
    )


def _device(group: dist.ProcessGroup | None) -> torch.device:
    if not dist.is_initialized():
        return torch.device("cpu")
    kind = dist.distributed_c10d._get_pg_default_device(group).type
    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, _get_device_module(kind).current_device())
