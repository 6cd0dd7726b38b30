"""Readers and writers of folders: torch's classes, with Shardkeep's bytes."""

from __future__ import annotations

import torch.distributed.checkpoint.filesystem as stock

from shardkeep.dcp.handed import rest_of

__all__ = ["FileSystemReader", "FileSystemWriter"]

__getattr__ = rest_of("filesystem")


class FileSystemWriter(stock.FileSystemWriter):
    """Torch's writer."""


class FileSystemReader(stock.FileSystemReader):
    """Torch's reader."""
