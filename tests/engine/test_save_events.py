"""Events, log lines and progress of a save, and callbacks that fail."""

from __future__ import annotations

import logging

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shardkeep as sk
from shardkeep.coordination import events
from shardkeep.stores import LocalStore
from shardkeep.testing import simulated_ranks
from shardkeep.util import retry

STATE = {"w": torch.ones(1000), "n": 1}


def names(received) -> list[str]:
    return [type(event).__name__ for event in received]


def of_kind(received, kind):
    return [event for event in received if isinstance(event, kind)]


def test_a_save_in_the_foreground_sends_an_event_for_each_stage(tmp_path):
    received = []
    sk.save(STATE, tmp_path / "a")
    report = sk.save(STATE, tmp_path / "a", overwrite=True, on_event=received.append)
    assert names(received) == [
        "SaveBegan", "ProgressMade", "FilesWritten", "SaveCommitted", "ReplacedFilesRemoved",
    ]  # fmt: skip
    assert {(event.path, event.rank, event.step) for event in received} == {
        (str(tmp_path / "a"), 0, None)
    }
    (committed,) = of_kind(received, events.SaveCommitted)
    assert (committed.save_id, committed.nbytes) == (report.save_id, report.nbytes)
    assert (committed.tensors, committed.objects) == (1, 1)
    assert 0 < committed.seconds_blocked <= committed.seconds
    assert received[-1].files == 2  # data and manifest


def test_an_asynchronous_save_sends_an_event_when_the_state_is_copied(tmp_path):
    received = []
    sk.async_save(STATE, tmp_path / "a", on_event=received.append).result(60)
    assert names(received) == [
        "SaveBegan", "StateStaged", "ProgressMade", "FilesWritten", "SaveCommitted",
    ]  # fmt: skip
    assert received[0].asynchronous
    assert received[1].nbytes >= 4000
    assert received[-1].seconds_blocked < received[-1].seconds


def test_a_failure_is_an_event(tmp_path):
    received = []
    sk.save(STATE, tmp_path / "a")
    with pytest.raises(sk.AlreadyExists) as caught:
        sk.save(STATE, tmp_path / "a", on_event=received.append)
    assert names(received) == ["SaveBegan", "WorkFailed"]
    assert received[1].work == "save" and received[1].error is caught.value


class ShakyStore(LocalStore):
    """A folder whose first writes fail."""

    failures = 2

    def open_positioned_writer(self, name, nbytes):
        self.failures -= 1
        if self.failures >= 0:
            raise OSError(5, "Input/output error", self.path_of(name))
        return super().open_positioned_writer(name, nbytes)


@pytest.mark.parametrize("call", [sk.save, sk.async_save])
def test_a_retry_is_an_event_and_a_log_line(tmp_path, call, caplog, monkeypatch):
    monkeypatch.setattr(retry, "_FIRST_PAUSE_SECONDS", 0.001)
    received = []
    done = call(STATE, ShakyStore(tmp_path / "a"), retries=2, on_event=received.append)
    if call is sk.async_save:
        done.result(60)
    retried = of_kind(received, events.Retried)
    assert [(event.attempt, event.retries) for event in retried] == [(1, 2), (2, 2)]
    assert all("Input/output error" in str(event.error) for event in retried)
    assert "rank 0 could not write" in caplog.text and "retry 2 of 2" in caplog.text
    assert sk.open(tmp_path / "a").verify().ok


def test_a_save_is_one_line_in_the_log(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "shardkeep"):
        sk.async_save(STATE, tmp_path / "a").result(60)
    (record,) = [one for one in caplog.records if one.levelno >= logging.INFO]
    assert record.name == "shardkeep"
    assert record.getMessage().startswith(f"saved {tmp_path / 'a'}: ")
    for words in ("KiB", "blocked for ", "durable after "):
        assert words in record.getMessage()


def save_with_hook(ranks, path):
    received = []
    sk.save({f"w{ranks.rank}": torch.ones(3)}, path, ranks=ranks, on_event=received.append)
    return received


def test_only_the_coordinator_logs_the_line_but_all_ranks_get_the_event(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "shardkeep"):
        all_received = simulated_ranks.run(3, save_with_hook, str(tmp_path / "a"))
    assert len([one for one in caplog.records if one.getMessage().startswith("saved ")]) == 1
    for rank, received in enumerate(all_received):
        (committed,) = of_kind(received, events.SaveCommitted)
        assert (committed.rank, committed.tensors) == (rank, 3)


@pytest.mark.parametrize("argument", ["progress", "on_event"])
@pytest.mark.parametrize("call", [sk.save, sk.async_save])
def test_a_callback_that_raises_does_not_lose_the_save(tmp_path, argument, call, caplog):
    def callback(*_):
        raise ZeroDivisionError("a bug in monitoring")

    done = call(STATE, tmp_path / "a", **{argument: callback})
    if call is sk.async_save:
        done.result(60)
    assert sk.open(tmp_path / "a").verify().ok
    warned = [one for one in caplog.records if "raised an exception" in one.getMessage()]
    assert len(warned) == 1 and warned[0].getMessage().startswith(f"{argument}=")
    assert "a bug in monitoring" in caplog.text


def test_progress_goes_to_the_callback_and_the_hook(tmp_path):
    seen, received = [], []
    sk.save(
        STATE, tmp_path / "a", progress=lambda *what: seen.append(what), on_event=received.append
    )
    made = of_kind(received, events.ProgressMade)
    assert seen == [(event.phase, event.done_nbytes, event.total_nbytes) for event in made] != []
