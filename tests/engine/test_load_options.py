"""Options of a load are checked first, and its events, log lines and reports are complete."""

from __future__ import annotations

import gc
import logging

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shardkeep as sk
from shardkeep.coordination.events import CheckpointLoaded, ProgressMade, WorkFailed
from shardkeep.stores import MemoryStore
from shardkeep.testing import simulated_ranks


@pytest.fixture
def store():
    store = MemoryStore("run/step_1")
    sk.save({"w": torch.arange(4.0), "n": 1}, store)
    return store


def template() -> dict:
    return {"w": torch.zeros(4), "n": 0}


@pytest.mark.parametrize(
    ("options", "kind", "why"),
    [
        (
            {"strikt": False},
            TypeError,
            "unexpected keyword argument 'strikt'; did you mean 'strict'",
        ),
        ({"trust": "module.Class"}, TypeError, "trust must be a list of class names"),
        ({"per_rank": "nearest"}, ValueError, "or a function, not 'nearest'"),
        ({"per_rank": {"rng": "nearest"}}, ValueError, "or a function, not 'nearest'"),
        ({"on_event": 3}, TypeError, "on_event must be a function or None, not 3"),
    ],
)
def test_options_are_checked_before_anything_is_read(tmp_path, options, kind, why):
    with pytest.raises(kind, match=why):
        sk.load(template(), tmp_path / "nothing is there", **options)


def test_a_load_is_an_event_and_a_log_line(store, caplog):
    caplog.set_level(logging.INFO, "shardkeep")
    seen = []
    report = sk.load(template(), store, on_event=seen.append)
    (loaded,) = [event for event in seen if not isinstance(event, ProgressMade)]
    assert loaded == CheckpointLoaded(
        path="run/step_1", names=2, nbytes=16, seconds=sum(report.seconds.values())
    )
    assert [record.getMessage() for record in caplog.records] == [
        f"loaded run/step_1: 2 names, 16 B on rank 0 in {loaded.seconds:.2f} s"
    ]


def test_a_load_that_fails_is_an_event(store):
    seen = []
    with pytest.raises(sk.Mismatch):
        sk.load({**template(), "more": 1}, store, on_event=seen.append)
    (failed,) = seen
    assert isinstance(failed, WorkFailed) and failed.work == "load"
    assert isinstance(failed.error, sk.Mismatch)


def test_the_log_has_one_line_for_the_load_of_all_ranks(store, caplog):
    caplog.set_level(logging.INFO, "shardkeep")
    simulated_ranks.run(3, lambda ranks: sk.load(template(), store, ranks=ranks))
    assert [record.getMessage()[:6] for record in caplog.records] == ["loaded"]


def test_an_error_of_the_hook_does_not_stop_the_load(store, caplog):
    def broken(event):
        raise RuntimeError("the metrics server is gone")

    state = template()
    sk.load(state, store, on_event=broken)
    assert state["n"] == 1 and "the metrics server is gone" in caplog.text


def test_the_report_prints_as_one_line(store):
    report = sk.load(template(), store)
    assert repr(report) == "<LoadReport: run/step_1, loaded 2 names, 16 B>"
    with pytest.raises(sk.Mismatch) as caught:
        sk.load({**template(), "more": 1}, store)
    assert repr(caught.value.report) == "<LoadReport: run/step_1, 1 name refused>"


class Waiting(dict):
    """A stateful object that records whether the garbage collector runs during its `state_dict`."""

    def state_dict(self):
        seen.append(gc.isenabled())
        return dict(self)

    def load_state_dict(self, state):
        seen.append(gc.isenabled())


seen: list[bool] = []


def test_the_garbage_collector_runs_while_stateful_objects_may_wait_for_other_ranks():
    store = MemoryStore("run/step_1")
    sk.save({"model": {"w": torch.ones(3)}}, store)
    seen.clear()
    assert gc.isenabled()
    sk.load({"model": Waiting(w=torch.zeros(3))}, store)
    assert seen == [True, True] and gc.isenabled()
