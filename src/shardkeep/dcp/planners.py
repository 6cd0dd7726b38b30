"""The default planners: here they carry options; planning itself is Shardkeep's."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DefaultLoadPlanner", "DefaultSavePlanner"]


@dataclass(frozen=True)
class DefaultSavePlanner:
    """Options of a save.

    Attributes:
        flatten_state_dict: False saves every top-level value as one leaf, containers as objects.
        flatten_sharded_tensors: has no effect; sharded tensors inside sharded ones are refused.
        dedup_replicated_tensors: has no effect; replicas are always written once.
        dedup_save_to_lowest_rank: has no effect; replicas are shared out evenly over the ranks.
        enable_plan_caching: has no effect; no plan is gathered that a cache could save.
    """

    flatten_state_dict: bool = True
    flatten_sharded_tensors: bool = True
    dedup_replicated_tensors: bool | None = None
    dedup_save_to_lowest_rank: bool = False
    enable_plan_caching: bool = False


@dataclass(frozen=True)
class DefaultLoadPlanner:
    """Options of a load.

    Attributes:
        flatten_state_dict: has no effect; either form of a checkpoint fits either form of a state.
        flatten_sharded_tensors: has no effect.
        allow_partial_load: True leaves untouched what the checkpoint does not have.
    """

    flatten_state_dict: bool = True
    flatten_sharded_tensors: bool = True
    allow_partial_load: bool = False
