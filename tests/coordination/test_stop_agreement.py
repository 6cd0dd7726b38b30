"""Ranks that request a stop at different steps stop at the same step, and none waits for ever."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from shardkeep.coordination.keyvalue.memory import MemoryKeyValueStore
from shardkeep.coordination.solo import Solo
from shardkeep.testing import simulated_ranks
from support import sessions
from support.waiting import PROMPT_SECONDS

Play = Callable[..., list[Any]]
OFTEN = {"SHARDKEEP_STOP_POLL_SECONDS": "0.01"}


@pytest.mark.parametrize("collective", [False, True])
@pytest.mark.parametrize("asking", [[2], [0, 1, 2, 3]])
def test_all_stop_at_one_step(play: Play, asking: list[int], collective: bool) -> None:
    found = play(sessions.stops, 3, 7, asking, collective, env=OFTEN)
    steps = [[step for step, _ in rounds] for rounds in found]
    assert steps == [steps[0]] * 4
    assert steps[0] == sorted(set(steps[0])) and len(steps[0]) == 3
    for rounds in found:
        for step, asked in rounds:
            assert asked <= step


@pytest.mark.parametrize("seed", range(12))
def test_all_stop_at_one_step_however_they_drift(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDKEEP_STOP_POLL_SECONDS", "0.005")
    size = 2 + seed % 5
    found = simulated_ranks.run(size, sessions.stops, 3, seed, [seed % size], bool(seed % 3))
    steps = [[step for step, _ in rounds] for rounds in found]
    assert steps == [steps[0]] * size


@pytest.mark.parametrize("leaver", [0, 2])
def test_nobody_waits_for_a_rank_that_has_left(play: Play, leaver: int) -> None:
    found = play(sessions.asked_and_left, leaver, size=3, env=OFTEN)
    assert found == [3 if rank == leaver else 60 for rank in range(3)]


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_does_not_answer_is_named(silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    timeouts = simulated_ranks.Timeouts(30.0, 0.3, 4)
    monkeypatch.setenv("SHARDKEEP_STOP_POLL_SECONDS", "0.01")
    found = simulated_ranks.run(3, sessions.nobody_answers, silent, timeouts=timeouts)
    for rank, told in enumerate(found):
        if rank == silent:
            assert told is None
        else:
            assert told == {
                "rank": silent,
                "text": f"rank {silent} on an unknown host failed in phase 'agree on a step' of "
                "run: its thread did not answer within 1.2 s",
            }


def test_one_process_stops_at_the_step_after_the_request() -> None:
    agreement = Solo().stop_agreement("run")
    assert not agreement.stops_at(1)
    agreement.request()
    assert not agreement.stops_at(1)  # The step at which the request was made is over.
    assert agreement.stops_at(2) and agreement.stops_at(2)
    assert not agreement.stops_at(3)
    agreement.request()
    assert agreement.stops_at(1)  # A job may go back to an earlier step.


@pytest.mark.parametrize("rounds", [1, 6])
def test_no_key_is_left_after_all_ranks_have_closed(
    rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDKEEP_STOP_POLL_SECONDS", "0.005")
    keys = MemoryKeyValueStore()
    simulated_ranks.run(3, sessions.stops, rounds, 1, [1], False, keys=keys)
    assert list(keys.names()) == []


@pytest.mark.parametrize("leaver", [0, 2])
def test_no_key_is_left_if_ranks_leave_at_different_times(
    leaver: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank leaves first; another one requests a stop, which comes to nothing."""
    monkeypatch.setenv("SHARDKEEP_STOP_POLL_SECONDS", "0.005")
    keys = MemoryKeyValueStore()
    simulated_ranks.run(3, sessions.asked_and_left, leaver, keys=keys)
    assert list(keys.names()) == []


def test_keys_of_many_rounds_do_not_accumulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDKEEP_STOP_POLL_SECONDS", "0.005")

    class Counting(MemoryKeyValueStore):
        most = 0

        def set(self, key: str, value: bytes) -> None:
            super().set(key, value)
            if "/stop/" in key:
                self.most = max(self.most, sum("/stop/" in name for name in self.names()))

    keys = Counting()
    simulated_ranks.run(3, sessions.stops, 8, 1, [1], False, keys=keys)
    # Of two rounds, a request and a target; of one, the holds. At the end, one for each rank.
    assert keys.most <= 2 * 2 + 3 + 3


def test_dropping_an_agreement_leaves_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise, the thread of a `Manager` that is never closed would poll the store for ever."""
    monkeypatch.setenv("SHARDKEEP_STOP_POLL_SECONDS", "0.01")

    def work(ranks: Any) -> None:
        agreement = ranks.stop_agreement("run")
        assert not agreement.stops_at(1)
        assert watching()

    simulated_ranks.run(2, work)
    gc.collect()
    wait_for(lambda: not watching())


def watching() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "shardkeep-stop-agreement"]


def wait_for(true: Callable[[], bool], seconds: float = PROMPT_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
