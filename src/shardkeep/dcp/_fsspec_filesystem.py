"""The older name of `fsspec_filesystem`."""

from __future__ import annotations

from shardkeep.dcp.bridge.torch_modules import forward_to_torch
from shardkeep.dcp.fsspec_filesystem import FsspecReader, FsspecWriter

__all__ = ["FsspecReader", "FsspecWriter"]

__getattr__ = forward_to_torch("_fsspec_filesystem", "fsspec_filesystem")
