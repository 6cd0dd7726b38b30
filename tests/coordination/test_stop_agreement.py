"""Ranks that ask at different steps stop at one and the same, and none waits for ever."""

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


def test_alone() -> None:
    meeting = Solo().meeting("run")
    assert not meeting.at(1)
    meeting.request()
    assert not meeting.at(1)  # That one is over.
    assert meeting.at(2) and meeting.at(2)
    assert not meeting.at(3)
    meeting.request()
    assert meeting.at(1)  # A job may go back to an earlier step.


def test_the_store_holds_no_more_after_many_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDKEEP_STOP_POLL_SECONDS", "0.005")
    left = []
    for rounds in (1, 6):
        keys = MemoryKeyValueStore()
        simulated_ranks.run(3, sessions.stops, rounds, 1, [1], False, keys=keys)
        wait_for(lambda: not watching())
        left.append(len(keys))
    # What all of them left by, and the round before.
    assert left[1] <= 2 + 1 + 3 + 1


def test_who_drops_a_meeting_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a `Manager` that nobody closes does: its thread would look into the store for ever."""
    monkeypatch.setenv("SHARDKEEP_STOP_POLL_SECONDS", "0.01")

    def work(ranks: Any) -> None:
        meeting = ranks.meeting("run")
        assert not meeting.at(1)
        assert watching()

    simulated_ranks.run(2, work)
    gc.collect()
    wait_for(lambda: not watching())


def watching() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "shardkeep-meeting"]


def wait_for(true: Callable[[], bool], seconds: float = PROMPT_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
