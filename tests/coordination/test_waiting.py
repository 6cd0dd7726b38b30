"""A rank that waits for others for long says for whom and why."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from shardkeep.coordination import waiting
from shardkeep.coordination.contract import Ranks, Session
from shardkeep.coordination.events import Event, EventSender, WaitingForRanks
from shardkeep.coordination.group import GroupSession
from shardkeep.coordination.keyvalue.ranks import KeyValueRanks
from shardkeep.coordination.keyvalue.timeouts import Timeouts
from shardkeep.testing import simulated_ranks
from support import sessions

TIMEOUTS = Timeouts(deadline_seconds=60, heartbeat_seconds=0.0, max_missed_heartbeats=20)


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_reports_come_after_ten_seconds_and_at_growing_intervals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, reports = Clock(), list[float]()
    monkeypatch.setattr(waiting, "monotonic", clock)
    wait = waiting.LongWait(reports.append)
    assert (wait.slice(3), wait.slice(60)) == (3, 10)
    for second in range(300):
        clock.now = 100.0 + second
        wait.report_if_due()
        assert wait.slice(1000) > 0
    assert reports == [10, 30, 70, 150]
    assert wait.slice(-1) == 0


class Recorder:
    """Records the events of all ranks, and lets a late rank go on once there is one."""

    def __init__(self) -> None:
        self.found: list[WaitingForRanks] = []
        self.reported = threading.Event()

    def __call__(self, event: Event) -> None:
        assert isinstance(event, WaitingForRanks)
        self.found.append(event)
        if event.rank == 0:
            self.reported.set()


def play(
    monkeypatch: pytest.MonkeyPatch,
    late: int,
    work: Callable[[Session, Callable[[], None]], None],
    *,
    before: bool = False,
) -> list[WaitingForRanks]:
    """Four ranks work together; one is late until rank 0 has reported its wait."""
    monkeypatch.setattr(waiting, "FIRST_REPORT_SECONDS", 0.05)
    recorder = Recorder()

    def hold() -> None:
        assert recorder.reported.wait(30)

    def scenario(ranks: KeyValueRanks) -> str:
        events = EventSender(recorder, path="run/step", rank=ranks.rank, step=7)
        if before and ranks.rank == late:
            hold()
        with ranks.session("save", "run/step", events=events) as session:
            work(session, hold if ranks.rank == late else lambda: None)
        return "done"

    assert simulated_ranks.run(4, scenario, timeouts=TIMEOUTS) == ["done"] * 4
    assert {(event.work, event.path, event.step) for event in recorder.found} == {
        ("save", "run/step", 7)
    }
    return recorder.found


def test_a_gather_names_the_ranks_whose_messages_have_not_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(session: Session, hold: Callable[[], None]) -> None:
        session.phase("write")
        hold()
        session.phase("report")
        session.gather(b"report")

    found = play(monkeypatch, 2, work)
    (first, *_) = (event for event in found if event.rank == 0)
    assert first.waiting_for == (2,)
    assert first.phase == "report"
    assert first.reason.startswith("the message has not come; rank 2 on ")
    assert first.seconds >= 0.05


def test_a_rank_that_waits_for_the_coordinator_says_for_whom_that_one_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(waiting, "FIRST_REPORT_SECONDS", 0.05)
    waits = threading.Event()

    def scenario(ranks: KeyValueRanks) -> None:
        def record(event: Event) -> None:
            recorder(event)
            if event.rank == 1 and "waits for rank 2" in str(event):
                waits.set()

        events = EventSender(record, path="run/step", rank=ranks.rank)
        with ranks.session("save", "run/step", events=events) as session:
            if ranks.rank == 2:
                assert waits.wait(30)
            session.gather(b"")
            session.broadcast(b"")

    often = Timeouts(deadline_seconds=60, heartbeat_seconds=0.02, max_missed_heartbeats=1000)
    simulated_ranks.run(3, scenario, timeouts=often)
    assert waits.is_set()


def test_the_coordinator_names_the_ranks_that_have_not_entered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = play(monkeypatch, 3, lambda session, hold: None, before=True)
    (first, *_) = (event for event in found if event.rank == 0)
    assert (first.waiting_for, first.phase) == ((3,), "enter")
    assert first.reason == "it has not entered"


def test_a_rank_names_the_coordinator_and_the_other_session_that_it_is_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a sender of events, the wait is logged."""
    monkeypatch.setattr(waiting, "FIRST_REPORT_SECONDS", 0.05)
    timeouts = Timeouts(deadline_seconds=1.0, heartbeat_seconds=0.0, max_missed_heartbeats=20)
    with caplog.at_level(logging.WARNING, "shardkeep"):
        first, second = simulated_ranks.run(2, sessions.strangers, timeouts=timeouts)
    assert (first["end"], second["end"]) == ("told", "told")
    lines = [record.getMessage() for record in caplog.records]
    assert any(
        line.startswith("rank 1 has been waiting for rank 0 for ")
        and line.endswith(
            "in phase 'enter' of the save of run/b: it has not answered the request to enter; "
            "it waits to enter the save of run/a"
        )
        for line in lines
    ), lines
    assert any(line.startswith("rank 0 has been waiting for rank 1 for ") for line in lines)


def test_short_waits_are_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "shardkeep"):
        simulated_ranks.run(4, sessions.conversation, [0, 100])
    assert caplog.records == []


def test_global_ranks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Part of a job, the ranks 4 and 6, names the ranks as the job does."""
    monkeypatch.setattr(waiting, "FIRST_REPORT_SECONDS", 0.05)
    recorder, reported = Recorder(), threading.Event()

    def record(event: Event) -> None:
        recorder(event)
        reported.set()

    def scenario(ranks: KeyValueRanks) -> None:
        half = KeyValueRanks(ranks._keys, ranks.rank, (4, 6), timeouts=TIMEOUTS)
        if ranks.rank == 1:
            assert reported.wait(30)
        events = EventSender(record, path="x", rank=(4, 6)[ranks.rank])
        with half.session("save", "x", events=events):
            pass

    simulated_ranks.run(2, scenario)
    assert [event.waiting_for for event in recorder.found[:1]] == [(6,)]


class BlockedDist:
    """`torch.distributed` of a rank that waits in a collective until its wait is reported."""

    def __init__(self) -> None:
        self.reported = threading.Event()

    def get_rank(self, group: Any) -> int:
        return 1

    def all_gather_object(self, statuses: list[Any], own: Any, group: Any) -> None:
        assert self.reported.wait(30)
        statuses[:] = [own] * len(statuses)


def test_a_collective_that_blocks_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "FIRST_REPORT_SECONDS", 0.05)
    dist, found = BlockedDist(), list[Event]()

    def record(event: Event) -> None:
        found.append(event)
        dist.reported.set()

    events = EventSender(record, path="run/step", rank=1)
    GroupSession(dist, None, [0, 1, 2], "save", "run/step", events=events).__enter__()
    event = found[0]
    assert isinstance(event, WaitingForRanks)
    assert event.waiting_for == (0, 2)
    assert "does not say which of them has not come" in event.reason


def test_a_hook_that_raises_does_not_end_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "FIRST_REPORT_SECONDS", 0.05)
    raised = threading.Event()

    def hook(event: Event) -> None:
        raised.set()
        raise ValueError("monitoring is down")

    def scenario(ranks: Ranks) -> list[bytes] | None:
        events = EventSender(hook, path="x", rank=ranks.rank)
        with ranks.session("save", "x", events=events) as session:
            if ranks.rank:
                assert raised.wait(30)
            return session.gather(b"came")

    assert simulated_ranks.run(2, scenario, timeouts=TIMEOUTS)[0] == [b"came"] * 2
