"""Sessions on simulated and on real ranks: the same scenarios have the same outcomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support import sessions
from support.waiting import PROMPT_SECONDS

Play = Callable[..., list[Any]]
MIB = 1 << 20


def test_messages_of_all_sizes(play: Play) -> None:
    sizes = [0, 1, 511, 513, MIB - 25, MIB, 2 * MIB + 1, 20 * MIB]
    assert play(sessions.conversation, sizes) == ["done"] * 4


@pytest.mark.parametrize("size", [1, 2])
def test_sessions_of_one_and_two_ranks(play: Play, size: int) -> None:
    assert play(sessions.conversation, [0, 3], size=size) == ["done"] * size


@pytest.mark.parametrize("culprit", [0, 2])
def test_a_failure_is_raised_on_all_ranks_in_every_phase(play: Play, culprit: int) -> None:
    for rank, rounds in enumerate(play(sessions.failure, culprit)):
        for where, (first, later) in zip(sessions.PHASES, rounds, strict=True):
            assert first.pop("took") < PROMPT_SECONDS
            if rank == culprit:
                assert first == {"end": "raised", "message": "boom"}
            else:
                assert first["end"] == "told"
                assert (first["rank"], first["phase"], first["path"]) == (
                    culprit,
                    where,
                    "run/step",
                )
                assert first["cause"].rstrip().endswith("ValueError: boom")
                assert "Traceback" in first["cause"]
                assert first["host"]
            assert later["end"] == "done"


TINY = {"SHARDKEEP_DEADLINE_SECONDS": "0.6", "SHARDKEEP_HEARTBEAT_SECONDS": "0.2"}


@pytest.mark.parametrize("culprit", [0, 3])
def test_rank_that_never_enters_is_named(play: Play, culprit: int) -> None:
    for rank, (first, last) in enumerate(play(sessions.absence, culprit, 1.5, env=TINY)):
        assert last == "done"
        if rank != culprit:
            assert (first["end"], first["rank"], first["phase"]) == ("told", culprit, "enter")
            assert "did not enter this save within 0.6 s" in first["cause"]


def test_rank_with_another_path_is_explained(play: Play) -> None:
    first, *_, last = play(sessions.strangers, env=TINY)
    assert first["rank"] == 3
    assert "it waits to enter the save of run/b" in first["cause"]
    assert last["rank"] == 0


def test_rank_that_is_late_is_named(play: Play) -> None:
    for first, last in play(sessions.lateness, 2, "write", 1.5, env=TINY):
        assert (first["end"], first["rank"]) == ("told", 2)
        assert "did not answer within 0.6 s" in first["cause"]
        assert last == "done"


def test_sessions_in_several_threads_are_independent(play: Play) -> None:
    first, *_ = results = play(sessions.parallel, 4)
    assert first == ["done", "told", "done", "done"]
    assert [ends[1] for ends in results] == ["told", "told", "raised", "told"]
    assert all(ends[0] == ends[2] == ends[3] == "done" for ends in results)
