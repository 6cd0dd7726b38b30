"""The steps of a run: what is committed, what stays, what is removed. No torch."""

from __future__ import annotations

from shardkeep.run.policies import KeepBest, KeepEvery, KeepLast
from shardkeep.run.step_names import StepNames
from shardkeep.run.steps import Steps

__all__ = ["KeepBest", "KeepEvery", "KeepLast", "StepNames", "Steps"]
