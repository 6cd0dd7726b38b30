"""An index as torch's own metadata classes."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from shardkeep.checkpoint import Checkpoint
from shardkeep.format.metadata_write import dcp_path
from shardkeep.types import DTYPES, Index

__all__ = ["metadata_of"]


def metadata_of(source: Checkpoint) -> Metadata:
    """What a checkpoint holds, in torch's own classes, as torch's reader would give it."""
    return _to_torch(source.index)


def _to_torch(index: Index) -> Metadata:
    """The metadata that stock torch's reader would give for this checkpoint.

    What the index does not know stays at its default: `requires_grad`, `version`, `storage_meta`.
    """
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for row, name in enumerate(index.tensors.names):
        shape = torch.Size(index.tensors.shape[row, : index.tensors.ndim[row]].tolist())
        dtype = getattr(torch, DTYPES[index.tensors.dtype[row]].name)
        properties = TensorProperties(dtype=dtype)
        entries[name] = TensorStorageMetadata(properties, shape, [])
    chunks = index.chunks
    for row, tensor in enumerate(chunks.tensor.tolist()):
        name = index.tensors.names[tensor]
        ndim = int(index.tensors.ndim[tensor])
        offsets = torch.Size(chunks.offsets[row, :ndim].tolist())
        sizes = torch.Size(chunks.sizes[row, :ndim].tolist())
        held = entries[name].chunks
        places[MetadataIndex(name, offsets, len(held))] = _StorageInfo(
            index.files[int(chunks.file[row])], int(chunks.item[row]), int(chunks.length[row])
        )
        held.append(ChunkStorageMetadata(offsets, sizes))
    objects = index.objects
    for row, name in enumerate(objects.names):
        entries[name] = BytesStorageMetadata()
        places[MetadataIndex(name)] = _StorageInfo(
            index.files[int(objects.file[row])], int(objects.item[row]), int(objects.length[row])
        )
    return Metadata(entries, planner_data=_planner_data(index), storage_data=places)


def _planner_data(index: Index) -> dict[str, tuple[str | int, ...]] | None:
    if index.structure is None:
        return None
    containers = index.structure.containers
    paths = {**index.structure.leaves, **index.twins}
    return {name: dcp_path(path, containers) for name, path in paths.items()}
