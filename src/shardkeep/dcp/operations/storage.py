"""The reader or writer to use: the caller's, or one that fits the checkpoint's id."""

from __future__ import annotations

import os
from typing import Any

from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from shardkeep.dcp import filesystem, fsspec_filesystem
from shardkeep.dcp.bridge.torch_messages import CANNOT_DETECT

__all__ = ["reader_for", "writer_for"]

_Id = str | os.PathLike[str] | None


def writer_for(given: StorageWriter | None, checkpoint_id: _Id) -> StorageWriter:
    """Return the given writer, or one that fits the id, reset to the id if there is one.

    Raises:
        RuntimeError: neither is given, or no writer fits the id.
    """
    kinds = (filesystem.FileSystemWriter, fsspec_filesystem.FsspecWriter)
    writer: StorageWriter = _storage_for(given, checkpoint_id, "storage_writer", kinds)
    return writer


def reader_for(given: StorageReader | None, checkpoint_id: _Id) -> StorageReader:
    """Return the given reader, or one that fits the id, reset to the id if there is one.

    Raises:
        RuntimeError: neither is given, or no reader fits the id.
    """
    kinds = (filesystem.FileSystemReader, fsspec_filesystem.FsspecReader)
    reader: StorageReader = _storage_for(given, checkpoint_id, "storage_reader", kinds)
    return reader


def _storage_for(given: Any, checkpoint_id: _Id, argument: str, kinds: tuple[Any, ...]) -> Any:
    if given is not None:
        if checkpoint_id is not None:
            given.reset(checkpoint_id)
        return given
    if not checkpoint_id:
        raise RuntimeError(f"give `checkpoint_id`, or a `{argument}`")
    for kind in kinds:
        if kind.validate_checkpoint_id(checkpoint_id):
            made = kind(checkpoint_id)
            made.reset(checkpoint_id)
            return made
    place = os.fspath(checkpoint_id)
    raise RuntimeError(f"{CANNOT_DETECT} a `{argument}` for {place!r}: give one")
