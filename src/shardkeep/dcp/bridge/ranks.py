"""The ranks that take part, by torch's arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from shardkeep.coordination.contract import Ranks
from shardkeep.coordination.solo import Solo

__all__ = ["members"]


def members(
    group: dist.ProcessGroup | Ranks | None, coordinator: int, no_dist: bool
) -> tuple[int, Sequence[int] | Ranks | None]:
    """Return this rank in the group, and the argument for `detect_ranks`.

    Args:
        group: a process group, by default the job's; or the ranks themselves.
        coordinator: the rank of the group that coordinates.
        no_dist: whether this process takes part alone.
    """
    if isinstance(group, Ranks):
        return group.rank, group
    if no_dist or not (dist.is_available() and dist.is_initialized()):
        return 0, Solo()
    if group is None and not coordinator:
        return dist.get_rank(), None
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    first = [ranks[coordinator]]
    return dist.get_rank(group), first + [rank for rank in ranks if rank not in first]
