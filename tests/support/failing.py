"""A failing save on real ranks."""

from __future__ import annotations

from typing import Any

import torch

import shardkeep as sk
import shardkeep.dcp as dcp


class Stateless:
    """A stateful object whose `state_dict` fails."""

    def state_dict(self) -> dict[str, Any]:
        raise ValueError("no state today")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError


def stateless(rank: int, size: int, path: str) -> tuple[str, str]:
    """Save asynchronously with an object that fails on rank 2; then save without it."""
    thing = Stateless() if rank == 2 else torch.nn.Linear(2, 2)
    try:
        dcp.async_save({"thing": thing}, checkpoint_id=f"{path}/a").result(30)
        end = "saved"
    except ValueError as error:
        end = f"ValueError: {error}"
    except sk.RankFailed as error:
        end = "told: " + str(error).strip().rpartition(": ")[2]
    dcp.async_save({"w": torch.ones(3)}, checkpoint_id=f"{path}/b").result(30)
    return end, "saved"
