"""The reader or writer to use: the caller's, or one that fits the checkpoint's id."""

from __future__ import annotations

import os
from typing import Any

from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from shardkeep.dcp import filesystem, fsspec_filesystem

__all__ = ["reader_for", "writer_for"]

_Id = str | os.PathLike[str] | None


def writer_for(given: StorageWriter | None, checkpoint_id: _Id) -> StorageWriter:
    """A writer, reset to the id if there is one. RuntimeError if nothing says where to."""
    kinds = (filesystem.FileSystemWriter, fsspec_filesystem.FsspecWriter)
    writer: StorageWriter = _set_up(given, checkpoint_id, "storage_writer", kinds)
    return writer


def reader_for(given: StorageReader | None, checkpoint_id: _Id) -> StorageReader:
    """A reader, reset to the id if there is one. RuntimeError if nothing says where from."""
    kinds = (filesystem.FileSystemReader, fsspec_filesystem.FsspecReader)
    reader: StorageReader = _set_up(given, checkpoint_id, "storage_reader", kinds)
    return reader


def _set_up(given: Any, checkpoint_id: _Id, name: str, kinds: tuple[Any, ...]) -> Any:
    if given is not None:
        if checkpoint_id is not None:
            given.reset(checkpoint_id)
        return given
    if not checkpoint_id:
        raise RuntimeError(f"give `checkpoint_id`, or a `{name}`")
    for kind in kinds:
        if kind.validate_checkpoint_id(checkpoint_id):
            made = kind(checkpoint_id)
            made.reset(checkpoint_id)
            return made
    raise RuntimeError(f"Cannot detect a `{name}` for {os.fspath(checkpoint_id)!r}: give one")
