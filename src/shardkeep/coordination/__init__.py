"""Who else takes part, and how they talk (see `contract.Ranks`). Nothing here imports torch."""

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
    """All ranks of the job: those of the initialised default process group, else this one alone.

    Args:
        ranks: global ranks of those that take part, the coordinator first; all of them pass the
            same. Those that do not take part make no call. A `Ranks` is returned as it is.

        by_path: False lets ranks work together that call the path differently, as on disks of
            their own; then only one save and one load at a time.

    Raises:
        ValueError: this process is not among `ranks`, or `ranks` repeats one or names one that
            does not exist.
    """
    if isinstance(ranks, Ranks):
        return ranks
    dist = _initialised()
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist else (0, 1)
    members = range(size) if ranks is None else tuple(ranks)
    if len(set(members)) != len(members) or not all(0 <= member < size for member in members):
        raise ValueError(f"ranks={list(members)} are not different ranks of a job of {size}")
    if rank not in members:
        raise ValueError(f"rank {rank} makes a call for ranks={list(members)}, but is none of them")
    if dist is None or len(members) == 1:
        return Solo()
    store = _default_store(dist)
    if store is None:
        if len(members) != size:
            raise ValueError("this job has no store: only all of its ranks can take part")
        return GroupRanks(dist)
    keys = TorchKeyValueStore(store, size)
    return KeyValueRanks(keys, members.index(rank), members, scope=_scope(), by_path=by_path)


def _initialised() -> Any:
    """torch.distributed, if this process has imported it and initialised its default group."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def _default_store(dist: Any) -> Any:
    """The store of the default group; None if it has none (MPI)."""
    group = dist.group.WORLD
    if hasattr(group, "get_group_store"):  # seen in 2.13
        return group.get_group_store()
    return dist.distributed_c10d._get_default_store()


def _scope() -> str:
    """The store of a torchrun agent outlives a restart of its ranks, with what they left in it."""
    return "/".join(
        os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    )
