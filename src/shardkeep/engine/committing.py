"""What the coordinator of a save does before the data is written, at the commit, and after it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch

from shardkeep.checkpoint import commit
from shardkeep.checkpoint.garbage import collect_garbage
from shardkeep.checkpoint.leases import Lease
from shardkeep.checkpoint.metrics import HEADER as METRICS
from shardkeep.coordination.contract import Session
from shardkeep.errors import LeaseLost, NotACheckpoint
from shardkeep.plan.distinct import distinct
from shardkeep.stores.contract import Store
from shardkeep.types import Index
from shardkeep.version import __version__

__all__ = [
    "check_files_exist",
    "manifest_header",
    "remove_replaced",
    "totals_of",
    "warn_of_differing_objects",
]

_MAX_SHOWN = 8
"""Ranks or names that a message lists."""


def warn_of_differing_objects(names: Sequence[str], stacklevel: int) -> None:
    """Warn that ranks have different values under one name."""
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    warnings.warn(
        f"ranks have different values of {', '.join(map(repr, names[:_MAX_SHOWN]))}{more}: the "
        "lowest rank's is saved; give each rank's its own name",
        stacklevel=stacklevel,
    )


def check_files_exist(store: Store, index: Index, session: Session) -> None:
    """Check that the coordinator sees the data files of all ranks.

    Raises:
        NotACheckpoint: files are missing: the folder was removed, or each rank has its own disk.
    """
    missing = [file for file in index.files if not commit.exists(store, file)]
    if not missing:
        return
    writers = sorted(set(map(commit.rank_of, missing)) - {session.rank})
    if not writers:
        raise NotACheckpoint(
            f"{store.url}: {missing[0]} was written, but has gone: was the folder removed or "
            "replaced meanwhile? nothing was committed"
        )
    hosts = [f"rank {rank} on {session.host(rank)}" for rank in writers[:_MAX_SHOWN]]
    hosts += [f"{len(writers) - _MAX_SHOWN} more ranks"] if len(writers) > _MAX_SHOWN else []
    raise NotACheckpoint(
        f"{store.url}: what {', '.join(hosts)} wrote there is not there for rank {session.rank} on "
        f"{session.host(session.rank)}: ranks must save to one place that all of them see; "
        "nothing was committed"
    )


def manifest_header(ranks: int, metrics: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Return what the manifest says about a save of so many ranks."""
    return {
        **({METRICS: dict(metrics)} if metrics else {}),
        "shardkeep": __version__,
        "torch": str(torch.__version__),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ranks": ranks,
    }


def remove_replaced(store: Store, replaced: frozenset[str], lease: Lease, stacklevel: int) -> int:
    """Remove the files of an overwritten checkpoint, and those of dead saves.

    The new checkpoint is committed, whatever happens here: a failure is a warning.

    Returns:
        The number of files of the overwritten checkpoint that were to be removed.
    """
    try:
        commit.remove_replaced(store, replaced)
        collect_garbage(store, lease)
    except (OSError, LeaseLost) as error:
        what = "files of the overwritten checkpoint, or of dead saves, stay behind"
        warnings.warn(f"{what}: {error}", stacklevel=stacklevel)
    return len(replaced)


def totals_of(index: Index) -> dict[str, int]:
    """Return how many tensors and objects a checkpoint holds, and the bytes of its files."""
    chunks = index.chunks
    _, items = distinct([chunks.file, chunks.item, chunks.length])
    return {
        "tensors": len(index.tensors.names),
        "objects": len(index.objects.names) - len(index.legacy_duplicates),
        "nbytes": int(chunks.length[items].sum()) + int(index.objects.length.sum()),
    }
