"""Events: their log lines, and what becomes of a hook that raises."""

import logging
from dataclasses import FrozenInstanceError

import pytest

from shardkeep.coordination import events
from shardkeep.coordination.events import EventSender

ALL = [
    events.SaveBegan(path="run/step_7", step=7, asynchronous=True),
    events.StateStaged(path="run/step_7", step=7, nbytes=3 << 20, seconds=0.25),
    events.FilesWritten(path="run/step_7", step=7, rank=2, nbytes=3 << 20, seconds=1.5),
    events.SaveCommitted(
        path="run/step_7",
        step=7,
        save_id="0" * 32,
        tensors=4,
        objects=2,
        nbytes=12 << 20,
        seconds_blocked=0.25,
        seconds=1.75,
    ),
    events.ReplacedFilesRemoved(path="a", files=1),
    events.Retried(path="a", rank=1, attempt=1, retries=3, error=OSError("full"), seconds=0.1),
    events.CheckpointLoaded(path="a", names=1_200, nbytes=5, seconds=0.5),
    events.StepRestored(path="run/step_5", step=5, passed_over=(7, 6), seconds=2),
    events.StepPassedOver(path="run/step_7", step=7, reason="Damaged: a file is cut short"),
    events.StepRemoved(path="run/step_1", step=1),
    events.WorkFailed(path="a", rank=3, work="load", error=ValueError("no")),
    events.WaitingForRanks(
        path="a", work="save", waiting_for=(1, 4), phase="write", reason="their files", seconds=12.4
    ),
    events.ProgressMade(path="a", phase="read", done_nbytes=512, total_nbytes=1024),
]

LINES = [
    "saving step 7 (run/step_7) asynchronously on rank 0",
    "copied 3.0 MiB of step 7 (run/step_7) on rank 0 in 0.25 s",
    "wrote 3.0 MiB of step 7 (run/step_7) on rank 2 in 1.50 s",
    "saved step 7 (run/step_7): 12.0 MiB, blocked for 0.25 s, durable after 1.75 s",
    "removed 1 file of the checkpoint that a replaced",
    "rank 1 could not write a: OSError: full; retry 1 of 3 in 0.1 s",
    "loaded a: 1,200 names, 5 B on rank 0 in 0.50 s",
    "restored step 5 (run/step_5) in 2.00 s; passed over unreadable steps: 7, 6",
    "cannot read step 7 (run/step_7), trying an older step: Damaged: a file is cut short",
    "deleted step 1 (run/step_1): the keep policy no longer includes it",
    "the load of a failed on rank 3: ValueError: no",
    "rank 0 has been waiting for ranks 1, 4 for 12 s in phase 'write' of the save of a: "
    "their files",
    "read of a on rank 0: 512 B of 1.0 KiB",
]


def test_the_text_of_each_event_is_its_log_line():
    assert [str(event) for event in ALL] == LINES


def test_every_kind_of_event_is_in_the_table_above():
    kinds = {name for name in events.__all__ if isinstance(getattr(events, name), type)}
    known = {type(event).__name__ for event in ALL}
    assert kinds - known == {"Event", "EventSender"}


def test_events_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        ALL[0].path = "b"


def test_only_the_first_ranks_of_a_long_list_are_named():
    waiting = events.WaitingForRanks(
        path="a", work="load", waiting_for=tuple(range(30)), phase="read", reason="x", seconds=10
    )
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 22 more for 10 s" in str(waiting)


def test_the_sender_completes_an_event_and_calls_the_hook():
    seen = []
    send = EventSender(seen.append, path="run/step_3", rank=2, step=3)
    send(events.FilesWritten(nbytes=1, seconds=2.0))
    send(events.StepRemoved(path="run/step_1", step=1))
    send.progress()("write", 5, 10)
    assert seen == [
        events.FilesWritten(path="run/step_3", rank=2, step=3, nbytes=1, seconds=2.0),
        events.StepRemoved(path="run/step_1", rank=2, step=1),
        events.ProgressMade(
            path="run/step_3", rank=2, step=3, phase="write", done_nbytes=5, total_nbytes=10
        ),
    ]


def logged(caplog, rank):
    caplog.clear()
    send = EventSender(None, path="a", rank=rank)
    for event in ALL:
        send(event)
    return {record.levelname: [] for record in caplog.records} | {
        level: [r.getMessage() for r in caplog.records if r.levelname == level]
        for level in {r.levelname for r in caplog.records}
    }


def test_the_coordinator_logs_one_line_for_what_all_ranks_report(caplog):
    caplog.set_level(logging.DEBUG, "shardkeep")
    first, second = logged(caplog, 0), logged(caplog, 1)
    assert {line.split()[0] for line in first["INFO"]} == {"saved", "loaded", "restored", "deleted"}
    assert {line.split()[0] for line in second["INFO"]} == {"deleted"}
    assert any(line.startswith("cannot read") for line in first["WARNING"])
    assert any(line.startswith("cannot read") for line in second["DEBUG"])
    assert {record.name for record in caplog.records} == {"shardkeep"}
    every = [line for lines in first.values() for line in lines]
    assert len(every) == len(ALL) - 1  # progress is not logged


def test_an_exception_of_a_hook_is_logged_once_with_its_traceback(caplog):
    calls = []

    def broken(event):
        calls.append(event)
        raise RuntimeError("the metrics server is gone")

    hook = events.guarded(broken)
    assert events.guarded(hook) is hook
    for rank in range(3):  # as several saves of one manager, which guards its hook once
        EventSender(hook, path="a", rank=rank)(events.ReplacedFilesRemoved(files=1))
    assert len(calls) == 3
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "on_event=" in record.getMessage() and "ignored" in record.getMessage()
    assert "RuntimeError: the metrics server is gone" in caplog.text


def test_an_interrupt_in_a_hook_is_not_ignored():
    def interrupted(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EventSender(interrupted, path="a", rank=0)(events.ReplacedFilesRemoved(files=1))
