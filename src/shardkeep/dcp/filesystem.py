"""Where a checkpoint is, in torch's terms: a reader and a writer of one folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import Metadata

from shardkeep import checkpoint
from shardkeep.dcp.metadata import to_torch

__all__ = ["FileSystemReader", "FileSystemWriter"]


class FileSystemReader:
    """Reads the checkpoint in a folder.

    Args:
        path: the folder.
        _extension_registry: not needed: the stream transforms that torch ships are understood.
    """

    def __init__(self, path: str | os.PathLike[str], _extension_registry: Any = None) -> None:
        self.path = Path(path)

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The folder."""
        return self.path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Turn to another folder."""
        if checkpoint_id:
            self.path = Path(checkpoint_id)

    def read_metadata(self) -> Metadata:
        """What the checkpoint holds, in torch's own classes. Raises as `shardkeep.open` does."""
        return to_torch(checkpoint.open(self.path).index)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this can be a path of a local folder."""
        return "://" not in os.fspath(checkpoint_id)


class FileSystemWriter:
    """Writes a checkpoint into a folder.

    Args:
        path: the folder.
        single_file_per_rank, thread_count, per_thread_copy_ahead, cache_staged_state_dict: have no
            effect on what is saved; how it is laid out in files is Shardkeep's own.
        sync_files: has no effect; a commit is always durable.
        overwrite: replace a checkpoint that is there; it loads until the new one is durable.
        _extensions, serialization_format: only the defaults are supported.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
        per_thread_copy_ahead: int = 10_000_000,
        cache_staged_state_dict: bool = False,
        overwrite: bool = True,
        _extensions: Sequence[Any] | None = None,
        serialization_format: SerializationFormat = SerializationFormat.TORCH_SAVE,
    ) -> None:
        if _extensions:
            raise NotImplementedError("shardkeep.dcp can't write with stream extensions yet")
        if serialization_format is not SerializationFormat.TORCH_SAVE:
            raise NotImplementedError(f"shardkeep.dcp can't write {serialization_format} yet")
        self.path = Path(path)
        self.overwrite = overwrite

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The folder."""
        return self.path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Turn to another folder."""
        if checkpoint_id:
            self.path = Path(checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this can be a path of a local folder."""
        return "://" not in os.fspath(checkpoint_id)
