"""Names that Hugging Face storage uses, also for releases of torch that lack them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from shardkeep.dcp.bridge.torch_modules import forward_to_torch, torch_module
from shardkeep.format.safetensors.parse import INDEX
from shardkeep.format.safetensors.write import file_name

__all__ = ["SHARDED_DIR_NAME", "_HFStorageInfo", "_gen_file_name", "_metadata_fn"]

__getattr__ = forward_to_torch("_hf_utils")

SHARDED_DIR_NAME = "sharded"
_metadata_fn = INDEX


def _gen_file_name(index: int, largest_index: int, shard_index: int | None = None) -> str:
    """Return the name of a file of a set, as torch's function does."""
    return file_name(index, largest_index, shard_index)


@dataclass
class _StorageInfo:
    """The location of a part of a tensor: path of the file, shape and dtype of the part."""

    relative_path: str
    shape: torch.Size
    dtype: torch.dtype


if TYPE_CHECKING:
    _HFStorageInfo = _StorageInfo
else:
    _HFStorageInfo = getattr(torch_module("_hf_utils"), "_HFStorageInfo", _StorageInfo)
