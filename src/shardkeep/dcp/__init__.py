"""A drop-in replacement for `torch.distributed.checkpoint`.

Names and signatures are torch's, so it is enough to change the import. If nothing is customised,
the engine saves and loads alone. Planners and storage that users derive from torch's classes are
called in the order that torch documents. Modules of torch's that Shardkeep does not replace are
re-exported.

Example:
    >>> import shardkeep.dcp as dcp    # was: import torch.distributed.checkpoint as dcp
    >>> dcp.save({"model": model.state_dict()}, checkpoint_id="run/step_100")
"""

from __future__ import annotations

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from shardkeep.dcp.bridge.torch_modules import reexport_torch_modules
from shardkeep.dcp.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from shardkeep.dcp.filesystem import FileSystemReader, FileSystemWriter
from shardkeep.dcp.fsspec_filesystem import FsspecReader, FsspecWriter
from shardkeep.dcp.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from shardkeep.dcp.optimizer import load_sharded_optimizer_state_dict
from shardkeep.dcp.protocol import CheckpointableTensor
from shardkeep.dcp.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from shardkeep.dcp.state_dict_loader import load, load_state_dict
from shardkeep.dcp.state_dict_saver import async_save, save, save_state_dict

__all__ = [
    "BytesStorageMetadata",
    "CheckpointException",
    "CheckpointableTensor",
    "ChunkStorageMetadata",
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "FileSystemReader",
    "FileSystemWriter",
    "FsspecReader",
    "FsspecWriter",
    "HuggingFaceStorageReader",
    "HuggingFaceStorageWriter",
    "LoadPlan",
    "LoadPlanner",
    "Metadata",
    "QuantizedHuggingFaceStorageReader",
    "ReadItem",
    "SavePlan",
    "SavePlanner",
    "StorageReader",
    "StorageWriter",
    "TensorStorageMetadata",
    "WriteItem",
    "async_save",
    "load",
    "load_sharded_optimizer_state_dict",
    "load_state_dict",
    "save",
    "save_state_dict",
]

reexport_torch_modules()
