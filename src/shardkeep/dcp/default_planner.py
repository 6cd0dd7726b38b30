"""The default planners: torch's own, for those who build on them, without their defects.

Where nothing is overridden they only carry options, and the engine plans. A class that derives from
them has everything that torch's have, called in the order that torch documents.
"""

from __future__ import annotations

import io
from typing import Any

import torch.distributed.checkpoint.default_planner as stock
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem

from shardkeep.dcp.bridge.trust import trusted
from shardkeep.dcp.handed import rest_of
from shardkeep.tensors.objects import from_bytes, to_bytes

__all__ = [
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "create_default_global_load_plan",
    "create_default_global_save_plan",
    "create_default_local_load_plan",
    "create_default_local_save_plan",
]

create_default_global_load_plan = stock.create_default_global_load_plan
create_default_global_save_plan = stock.create_default_global_save_plan
create_default_local_load_plan = stock.create_default_local_load_plan
create_default_local_save_plan = stock.create_default_local_save_plan
__getattr__ = rest_of("default_planner")


class DefaultSavePlanner(stock.DefaultSavePlanner):
    """Torch's default planner; see there for the options.

    Replicas are balanced over the ranks by the bytes of their shards, not of their whole tensors.
    """

    def _dedup_save_plans(self, all_plans: list[SavePlan]) -> list[SavePlan]:
        return _without_repeats(all_plans, lowest=self.dedup_save_to_lowest_rank)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """An object as it is stored. Raises Conflict, naming it, if it can't be."""
        if write_item.type.name == "BYTE_IO":
            return io.BytesIO(to_bytes(object, name=write_item.index.fqn))
        return object


class DefaultLoadPlanner(stock.DefaultLoadPlanner):
    """Torch's default planner; see there for the options.

    Objects of classes that are not known to be safe raise `Untrusted`. Values go under the very
    keys that the state has, flattened or not.
    """

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put an object where the state has it."""
        name = read_item.dest_index.fqn
        loaded = from_bytes(value.getvalue(), name=name, trust=trusted())
        if self.flatten_state_dict:
            _put(self.original_state_dict, self.mappings[name], loaded)
            return
        self.state_dict[name] = loaded
        # Torch's own leaves the caller's state as it was.
        self.original_state_dict[name] = loaded
