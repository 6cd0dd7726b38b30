"""Reports of a manager: events, log lines, and its values as text."""

from __future__ import annotations

import logging

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shardkeep as sk
from shardkeep.coordination.events import (
    StepPassedOver,
    StepRemoved,
    StepRestored,
    WorkFailed,
)
from shardkeep.testing import simulated_ranks


def state(step: int) -> dict:
    return {"w": torch.full((40, 5), float(step)), "step": step}


def damage(folder) -> None:
    metadata = folder / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:-1])


def of_kind(seen, *kinds):
    return [event for event in seen if isinstance(event, kinds)]


def lines(caplog, start):
    """Return level and text of the log lines that begin with a word."""
    return [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name == "shardkeep" and record.getMessage().startswith(start)
    ]


def test_a_deleted_step_is_an_event_and_a_log_line(tmp_path, caplog):
    caplog.set_level(logging.INFO, "shardkeep")
    seen = []
    with sk.Manager(tmp_path, keep=sk.KeepLast(1), on_event=seen.append) as m:
        for step in (1, 2, 3):
            m.save(step, state(step))
            m.wait()
    paths = [str(tmp_path / f"step_{step}") for step in (1, 2)]
    assert of_kind(seen, StepRemoved) == [
        StepRemoved(path=path, step=step) for path, step in zip(paths, (1, 2), strict=True)
    ]
    assert lines(caplog, "deleted") == [
        ("INFO", f"deleted step {step} ({path}): the keep policy no longer includes it")
        for path, step in zip(paths, (1, 2), strict=True)
    ]


def test_a_restore_and_the_steps_it_passes_over_are_events_and_log_lines(tmp_path, caplog):
    caplog.set_level(logging.INFO, "shardkeep")
    with sk.Manager(tmp_path) as m:
        for step in (1, 2, 3):
            m.save(step, state(step))
    damage(tmp_path / "step_3")
    seen = []
    m = sk.Manager(tmp_path, on_event=seen.append)
    with pytest.warns(UserWarning, match="step 3 cannot be read, so step 2 is restored"):
        assert m.restore(state(0)) == 2
    passed, restored = of_kind(seen, StepPassedOver, StepRestored)
    assert (passed.step, passed.path) == (3, str(tmp_path / "step_3"))
    assert passed.reason == m.restored.passed_over[3]
    assert (restored.step, restored.passed_over) == (2, (3,)) and restored.seconds > 0
    ((level, line),) = lines(caplog, "cannot read")
    assert level == "WARNING"
    assert line.startswith(f"cannot read step 3 ({tmp_path / 'step_3'}), trying an older step: ")
    ((level, line),) = lines(caplog, "restored")
    assert level == "INFO"
    assert line.startswith(f"restored step 2 ({tmp_path / 'step_2'}) in ")
    assert line.endswith("; passed over unreadable steps: 3")


def test_a_failed_restore_is_an_event(tmp_path):
    sk.Manager(tmp_path).save(1, state(1)).result(60)
    seen = []
    with pytest.raises(sk.Mismatch):
        sk.Manager(tmp_path, on_event=seen.append).restore({**state(0), "more": 1}, step=1)
    failed = [event for event in of_kind(seen, WorkFailed) if event.work == "restore"]
    assert [(event.step, type(event.error)) for event in failed] == [(1, sk.Mismatch)]


def test_the_log_of_all_ranks_has_one_line_for_a_restore(tmp_path, caplog):
    caplog.set_level(logging.INFO, "shardkeep")

    def one(ranks):
        with sk.Manager(tmp_path, ranks=ranks) as m:
            m.save(1, {"mine": {ranks.rank: torch.ones(3)}}).result(60)
            return m.restore({"mine": {ranks.rank: torch.zeros(3)}})

    assert simulated_ranks.run(3, one) == [1, 1, 1]
    assert len(lines(caplog, "restored")) == 1


def test_an_error_of_the_hook_does_not_lose_a_step(tmp_path, caplog):
    def broken(event):
        raise RuntimeError("the metrics server is gone")

    with sk.Manager(tmp_path, keep=sk.KeepLast(1), on_event=broken) as m:
        for step in (1, 2, 3):
            m.save(step, state(step))
            m.wait()
        assert m.restore(state(0)) == 3
    assert m.steps() == [3]
    assert len(lines(caplog, "on_event=")) == 1


def test_values_are_printed_on_one_line(tmp_path):
    m = sk.Manager(tmp_path, every=100)
    assert repr(m) == f"<Manager: {tmp_path}, rank 0 of 1, every 100 steps, keeps all steps>"
    handle = m.save(1, state(1))
    handle.result(60)
    assert repr(handle) == "<StepHandle: step 1, saved>"
    with pytest.raises(sk.AlreadyExists):
        m.save(1, state(1))
    m = sk.Manager(tmp_path, on_error="warn")
    with pytest.warns(UserWarning, match="step 1 was not saved"):
        failed = m.save(1, state(1))
    assert repr(failed) == "<StepHandle: step 1, failed with AlreadyExists>"
    assert repr(sk.StepHandle.skipping(7)) == "<StepHandle: step 7, skipped>"
    m.restore(state(0))
    assert repr(m.restored) == "<Restored: step 1>"
    m.save(2, state(2)).result(60)
    damage(tmp_path / "step_2")
    with pytest.warns(UserWarning):
        m.restore(state(0))
    assert repr(m.restored) == "<Restored: step 1, passed over 2>"


@pytest.mark.parametrize("options", [{"files": 2}, {"balance_replicas": False}, {"flatten": False}])
def test_a_manager_takes_every_option_of_a_save(tmp_path, options):
    with sk.Manager(tmp_path, **options) as m:
        m.save(1, {"model": {"a": torch.ones(1000), "b": torch.zeros(1000)}})
    files = len(list((tmp_path / "step_1").glob("*.distcp")))
    assert files == options.get("files", 1)
    assert ("model" in sk.open(tmp_path / "step_1")) == ("flatten" in options)


def test_an_unknown_option_is_refused_before_any_file_is_created(tmp_path):
    with pytest.raises(TypeError, match="'low_prio'; did you mean 'low_priority'"):
        sk.Manager(tmp_path / "run", low_prio=True)
    assert not (tmp_path / "run").exists()
