"""A job whose ranks have values of their own: random states, and positions of data loaders."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

import shardkeep as sk
from shardkeep.coordination.contract import Ranks


class Loader:
    """A data loader that can save and restore its position."""

    def __init__(self, seed: int) -> None:
        self.order = random.Random(seed).sample(range(1000), 100)
        self.position = 0

    def take(self, count: int) -> list[int]:
        self.position += count
        return self.order[self.position - count : self.position]

    def state_dict(self) -> dict[str, Any]:
        return {"order": list(self.order), "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.position = state["order"], state["position"]


class Rank:
    """One rank of the job: three generators and a data loader."""

    def __init__(self, seed: int) -> None:
        self.python = random.Random(seed)
        self.numpy = np.random.RandomState(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.loader = Loader(seed)

    def draw(self) -> tuple[Any, ...]:
        """Return the next numbers of every generator, and the next items of the loader."""
        return (
            [self.python.random() for _ in range(5)],
            self.numpy.standard_normal(5).tobytes(),
            torch.rand(5, generator=self.torch).numpy().tobytes(),
            self.loader.take(5),
        )

    def state(self) -> dict[str, Any]:
        rng = {
            "python": self.python.getstate(),
            "numpy": self.numpy.get_state(),
            "torch": self.torch.get_state(),
        }
        return {
            "weight": torch.arange(12.0).reshape(4, 3),
            "rng": sk.PerRank(rng),
            "loader": sk.PerRank(self.loader),
            "deep": [{"mine": sk.PerRank(torch.full((3,), float(self.loader.order[0])))}],
            "step": sk.Replicated(7),
        }

    def set(self, state: dict[str, Any]) -> None:
        rng = state["rng"].value
        self.python.setstate(rng["python"])
        self.numpy.set_state(rng["numpy"])
        self.torch.set_state(rng["torch"])


def resume(ranks: Ranks, path: str) -> dict[str, Any]:
    """Save in the middle of a run, load into a new rank, and compare the numbers drawn next."""
    one = Rank(100 + ranks.rank)
    one.draw()
    state = one.state()
    sk.save(state, path, ranks=ranks)
    mine = state["deep"][0]["mine"].value.clone()
    drawn = one.draw()
    other = Rank(7)
    later = other.state()
    later["step"] = sk.Replicated(0)
    report = sk.load(later, path, ranks=ranks)
    other.set(later)
    assert later["step"].value == 7
    assert torch.equal(later["deep"][0]["mine"].value, mine)
    assert isinstance(later["loader"].value, Loader)
    return {"same": other.draw() == drawn, "drawn": drawn, "unexpected": report.unexpected}


def save(ranks: Ranks, path: str, state: dict[str, Any]) -> str:
    """Save this rank's entry of `state`; return "saved" or the text of the refusal."""
    try:
        sk.save(state[ranks.rank], path, ranks=ranks)
    except sk.Conflict as error:
        return str(error)
    return "saved"


def load(ranks: Ranks, path: str, per_rank: Any) -> tuple[Any, ...]:
    """Load on any number of ranks; return the values of this rank, and the report."""
    state = {"a": {"mine": sk.PerRank("untouched")}, "b": sk.PerRank("untouched"), "c": 0}
    try:
        report = sk.load(state, path, ranks=ranks, per_rank=per_rank)
    except sk.Mismatch as error:
        return str(error), error.report.refused, state
    return state["a"]["mine"].value, state["b"].value, state["c"], report
