"""`save` and `load`, with torch's signatures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from shardkeep.contracts import Ranks
from shardkeep.dcp.filesystem import FileSystemReader, FileSystemWriter
from shardkeep.dcp.planners import DefaultLoadPlanner, DefaultSavePlanner
from shardkeep.loading import load as _load
from shardkeep.ranks.solo import Solo
from shardkeep.saving import save as _save

__all__ = ["load", "save"]


def save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: FileSystemWriter | None = None,
    planner: DefaultSavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Metadata:
    """Save a state; see `shardkeep.save`. Overwrites by default, as torch does, but safely.

    Args:
        use_collectives: has no effect; no collective is used either way.

    Raises:
        ValueError: neither `checkpoint_id` nor `storage_writer` says where to.
        NotImplementedError: the writer or the planner is not one of this package's own.
    """
    writer = _own(storage_writer, FileSystemWriter, checkpoint_id)
    options = _options(planner, DefaultSavePlanner)
    _save(
        state_dict,
        writer.path,
        overwrite=writer.overwrite,
        flatten=options.flatten_state_dict,
        ranks=_ranks(process_group, no_dist),
    )
    return FileSystemReader(writer.path).read_metadata()


def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: FileSystemReader | None = None,
    planner: DefaultLoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> None:
    """Fill a state in place; see `shardkeep.load`. Other dtypes are cast, with a warning.

    Raises:
        ValueError: neither `checkpoint_id` nor `storage_reader` says where from.
        NotImplementedError: the reader or the planner is not one of this package's own.
    """
    reader = _own(storage_reader, FileSystemReader, checkpoint_id)
    options = _options(planner, DefaultLoadPlanner)
    report = _load(
        state_dict,
        reader.path,
        strict=not options.allow_partial_load,
        dtype="cast",
        ranks=_ranks(process_group, no_dist),
    )
    for name, (stored, wanted) in report.cast.items():
        warnings.warn(f"{name}: stored as {stored}, cast to {wanted}", stacklevel=2)


def _own(given: Any, kind: Any, checkpoint_id: str | os.PathLike[str] | None) -> Any:
    """The reader or writer to use; one that overrides something would not be obeyed."""
    if given is None:
        if checkpoint_id is None:
            raise ValueError(f"give checkpoint_id, or a {kind.__name__}")
        return kind(checkpoint_id)
    if type(given) is not kind:
        raise NotImplementedError(
            f"{type(given).__module__}.{type(given).__qualname__} can't be used yet: "
            f"only shardkeep.dcp.{kind.__name__} itself"
        )
    given.reset(checkpoint_id)
    return given


def _options(planner: Any, kind: Any) -> Any:
    if planner is None:
        return kind()
    if type(planner) is not kind:
        raise NotImplementedError(
            f"{type(planner).__module__}.{type(planner).__qualname__} can't be used yet: "
            f"only shardkeep.dcp.{kind.__name__} itself"
        )
    return planner


def _ranks(group: dist.ProcessGroup | None, no_dist: bool) -> Sequence[int] | Ranks | None:
    if no_dist:
        return Solo()
    return None if group is None else dist.get_process_group_ranks(group)
