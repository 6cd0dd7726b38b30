"""The steps of a run: what is committed, what stays, what goes. No torch."""

from __future__ import annotations

from shardkeep.manager.names import StepNames
from shardkeep.manager.policies import KeepBest, KeepEvery, KeepLast
from shardkeep.manager.steps import Steps

__all__ = ["KeepBest", "KeepEvery", "KeepLast", "StepNames", "Steps"]
