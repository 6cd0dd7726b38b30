"""The older name of `fsspec_filesystem`."""

from __future__ import annotations

from shardkeep.dcp.fsspec_filesystem import FsspecReader, FsspecWriter
from shardkeep.dcp.reexports import rest_of

__all__ = ["FsspecReader", "FsspecWriter"]

__getattr__ = rest_of("_fsspec_filesystem", "fsspec_filesystem")
