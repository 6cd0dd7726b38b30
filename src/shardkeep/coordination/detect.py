"""Which ranks take part: found in `torch.distributed`, if this process uses it.

Nothing here imports torch: if the process has not imported `torch.distributed`, it is alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from shardkeep.coordination.contract import Ranks
from shardkeep.coordination.group import GroupRanks
from shardkeep.coordination.keyvalue.ranks import KeyValueRanks
from shardkeep.coordination.keyvalue.torch_store import TorchKeyValueStore
from shardkeep.coordination.solo import Solo

__all__ = ["detect_ranks"]


def detect_ranks(ranks: Sequence[int] | Ranks | None = None, *, by_path: bool = True) -> Ranks:
    """Return the ranks that take part: by default all of the job, or this process alone.

    The job is that of the default process group of `torch.distributed`, if it is initialized.

    Args:
        ranks: the global ranks that take part, the coordinator first. Each of them passes the same
            ranks, and other ranks make no call. A `Ranks` object is returned as it is.
        by_path: False lets ranks work together that name the path differently, because they have
            disks of their own. Then the job can enter only one save and one load at a time.

    Raises:
        ValueError: this process is not among `ranks`, or `ranks` has a duplicate or a rank that
            does not exist.
    """
    if isinstance(ranks, Ranks):
        return ranks
    dist = _initialized_distributed()
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist else (0, 1)
    members = range(size) if ranks is None else tuple(ranks)
    if len(set(members)) != len(members) or not all(0 <= member < size for member in members):
        raise ValueError(
            f"ranks={list(members)} must be different ranks of this job, which has {size}: "
            f"numbers from 0 to {size - 1}"
        )
    if rank not in members:
        raise ValueError(
            f"rank {rank} made a call with ranks={list(members)}, but is not among them; only "
            "these ranks may make it"
        )
    if dist is None or len(members) == 1:
        return Solo()
    store = _default_store(dist)
    if store is None:
        if len(members) != size:
            raise ValueError(
                f"ranks={list(members)} are only some of the {size} ranks, but this job has no "
                "key-value store (as with MPI): all ranks must take part; leave out ranks="
            )
        return GroupRanks(dist)
    keys = TorchKeyValueStore(store, size)
    scope = _restart_scope()
    return KeyValueRanks(keys, members.index(rank), members, scope=scope, by_path=by_path)


def _initialized_distributed() -> Any:
    """Return torch.distributed if its default group is initialized; otherwise None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def _default_store(dist: Any) -> Any:
    """Return the store of the default group; None if it has none (MPI)."""
    group = dist.group.WORLD
    if hasattr(group, "get_group_store"):  # torch 2.13
        return group.get_group_store()
    return dist.distributed_c10d._get_default_store()


def _restart_scope() -> str:
    """Return what differs between restarts of a job under torchrun.

    The store of torchrun's agent outlives a restart of the ranks, with all keys that they left.
    """
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return "/".join(os.environ.get(name, "") for name in names)
