"""The state to save: a few megabytes, each bit a function of the step and the rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["RANKS", "differences", "state", "template"]

RANKS = 4
_OWN, _SHARED, _SMALL = 300_000, 200_000, 5


def _random(shape: int, *key: int) -> torch.Tensor:
    chance = np.random.default_rng(key)
    return torch.from_numpy(chance.integers(0, 2**31, shape, dtype=np.int32)).view(torch.float32)


def state(step: int, rank: int) -> dict[str, Any]:
    """Return the state of a rank: tensors of its own, tensors that all ranks share, values."""
    return {
        "shared": {
            "weight": _random(_SHARED, step, RANKS),
            **{f"b{i}": _random(50 + i, step, RANKS, i) for i in range(_SMALL)},
        },
        f"rank_{rank}": {"weight": _random(_OWN, step, rank), "seen": {step, rank}},
        "step": step,
    }


def template() -> dict[str, Any]:
    """Return a template for the states of all ranks."""
    whole: dict[str, Any] = {}
    for rank in range(RANKS):
        whole |= state(0, rank)
    return whole


def differences(loaded: dict[str, Any], step: int) -> list[str]:
    """Return the names whose values differ in any bit from those of a step."""
    expected: dict[str, Any] = {}
    for rank in range(RANKS):
        expected |= state(step, rank)
    return [name for name in expected if not _same(loaded.get(name), expected[name])]


def _same(one: Any, other: Any) -> bool:
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in other)
    if isinstance(other, torch.Tensor):
        return torch.equal(one.view(torch.int32), other.view(torch.int32))
    return type(one) is type(other) and one == other
