"""Reports of saves and loads: phases, rate, the slowest rank, and the printed line."""

from __future__ import annotations

import io
import time

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shardkeep as sk
from shardkeep.coordination.timing import Clock
from shardkeep.engine.load_report import LoadReport
from shardkeep.stores import MemoryStore
from shardkeep.testing import simulated_ranks


def test_a_load_report_prints_as_one_line():
    report = LoadReport(
        "run",
        nbytes=2_040_109_466,
        seconds={"plan": 0.0156, "read": 0.1914, "restore": 0.001},
        slowest=(3, 0.2314),
    )
    assert str(report) == (
        "loaded 1.9 GiB in 0.21 s (10.7 GB/s): plan 0.02, read 0.19, restore 0.00; "
        "slowest rank 3, 0.23 s"
    )
    assert report.rate == pytest.approx(2.040109466 / 0.1914)
    assert LoadReport("run").rate == 0.0
    assert str(LoadReport("run", nbytes=1023)).startswith("loaded 1023 B in 0.00 s (0.0 GB/s)")
    assert str(LoadReport("run", nbytes=1024)).startswith("loaded 1.0 KiB in")


def test_a_save_report_prints_as_one_line():
    report = sk.SaveReport(
        "run", "0" * 32, tensors=3, objects=1, nbytes=397_110, written=1024,
        seconds={"plan": 0.0156, "write": 0.5, "sync": 0.25, "commit": 0.001}, slowest=(3, 0.7812),
    )  # fmt: skip
    assert str(report) == (
        "saved 387.8 KiB in 0.77 s, this rank 1.0 KiB (0.0 GB/s): "
        "plan 0.02, write 0.50, sync 0.25, commit 0.00; slowest rank 3, 0.78 s"
    )
    assert report.rate == pytest.approx(1024 / 0.75 / 1e9)


class Terminal(io.StringIO):
    """A standard error stream that claims to be a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("work", ["save", "load", "async_save"])
def test_a_progress_bar_is_shown_only_on_request_and_on_a_terminal(monkeypatch, work):
    state, store = {"w": torch.zeros(4)}, MemoryStore()
    sk.save(state, store)

    def shown(terminal, **how):
        monkeypatch.setattr("sys.stderr", terminal)
        if work == "load":
            sk.load(state, store, **how)
        elif work == "save":
            sk.save(state, store, overwrite=True, **how)
        else:
            sk.async_save(state, store, overwrite=True, **how).result()
        return terminal.getvalue()

    bar = shown(Terminal(), progress=True)
    assert ("read" if work == "load" else "write") in bar
    assert "check" not in bar
    assert shown(Terminal()) == shown(io.StringIO(), progress=True) == ""


def test_policies_are_checked_also_where_nothing_differs():
    state, store = {"w": torch.zeros(4)}, MemoryStore()
    sk.save(state, store)
    for how, words in (
        ({"dtype": "csat"}, "dtype policy must be one of .*'error', 'cast', 'upcast'.*not 'csat'"),
        ({"dtype": {"b": "no"}}, "not 'no'"),
        ({"strict": "no"}, "strict must be True or False, not 'no'"),
        ({"strict": {"b": 1}}, "strict must be True or False, not 1"),
    ):
        with pytest.raises(ValueError, match=words):
            sk.load(state, store, **how)


def test_a_mismatch_of_one_name_is_reported_in_the_singular():
    store = MemoryStore()
    sk.save({"w": torch.zeros(4)}, store)
    with pytest.raises(sk.errors.Mismatch, match="1 name does not match; nothing was read"):
        sk.load({"w": torch.zeros(5)}, store)


class Slow(dict):
    """A state that is slow on one rank."""

    seconds = 0.0

    def items(self):
        time.sleep(self.seconds)
        return super().items()


def load_slowly(ranks, store):
    state = Slow(w=torch.zeros(4))
    state.seconds = 0.3 if ranks.rank == 1 else 0.0
    return sk.load(state, store, ranks=ranks)


def test_every_rank_learns_which_rank_was_the_slowest():
    store = MemoryStore()
    sk.save({"w": torch.arange(4.0)}, store)
    reports = simulated_ranks.run(3, load_slowly, store)
    assert {report.slowest for report in reports} == {reports[0].slowest}
    rank, seconds = reports[0].slowest
    assert rank == 1
    assert seconds == sum(reports[1].seconds.values()) >= 0.3
    assert all(list(report.seconds) == ["plan", "read", "restore"] for report in reports)
    assert all(report.nbytes == 16 for report in reports)


class PhaseRecorder:
    """A session that records the phases reported to it."""

    def __init__(self):
        self.phases = []

    def phase(self, name):
        self.phases.append(name)


def test_a_clock_reports_phases_under_the_names_of_their_parts():
    session = PhaseRecorder()
    clock = Clock(session, {"open": "plan", "match": "plan"})
    for name in ("open", "match", "read"):
        clock.phase(name)
    time.sleep(0.01)
    clock.part("restore")
    assert session.phases == ["open", "match", "read"]
    found = clock.seconds()
    assert list(found) == ["plan", "read", "restore"]
    assert found["read"] >= 0.01
    plain = Clock(PhaseRecorder())
    plain.phase("write")
    assert list(plain.seconds()) == ["write"]


def test_progress_counts_large_and_small_tensors_together():
    store, told = MemoryStore(), []
    state = {"large": torch.arange(1 << 18), **{f"t{i}": torch.full((9,), i) for i in range(50)}}
    sk.save(state, store)
    template = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    report = sk.load(template, store, progress=lambda *what: told.append(what))
    assert {(phase, total) for phase, _, total in told} == {("read", report.read)}
    assert sorted(done for _, done, _ in told)[-1] == report.read
    assert len(told) > 1
    assert all(torch.equal(template[name], tensor) for name, tensor in state.items())
