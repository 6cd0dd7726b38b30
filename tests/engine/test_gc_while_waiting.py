"""The garbage collector runs while a rank waits for a slow one, as it serves all threads."""

from __future__ import annotations

import gc
import threading
import time

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shardkeep as sk
from shardkeep.coordination.timing import Clock
from shardkeep.testing import simulated_ranks


class SlowModel:
    """An object whose `state_dict` waits until rank 0 waits, and then checks the collector."""

    def __init__(self, waiting: threading.Event) -> None:
        self.waiting, self.was_enabled = waiting, False

    def state_dict(self):
        assert self.waiting.wait(60)
        for _ in range(3000):  # Rank 0 may still have work of its own to do.
            if gc.isenabled():
                self.was_enabled = True
                break
            time.sleep(0.01)
        return {"w": torch.ones(3)}

    def load_state_dict(self, state):
        raise AssertionError


def save(ranks, path, model):
    state = {"model": model} if ranks.rank == 1 else {"other": torch.ones(3)}
    sk.save(state, path, ranks=ranks)


def test_the_collector_is_on_while_a_save_waits_for_a_slow_rank(tmp_path, monkeypatch):
    waiting = threading.Event()
    phase = Clock.phase

    def phase_begins(clock, name):
        phase(clock, name)
        if clock._session.rank == 0 and name == "assign":
            waiting.set()

    monkeypatch.setattr(Clock, "phase", phase_begins)
    model = SlowModel(waiting)
    assert gc.isenabled()
    simulated_ranks.run(2, save, str(tmp_path / "a"), model)
    assert model.was_enabled
    assert gc.isenabled()
