"""The crash runs: a short one, and that its checks can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.gloo]

from crash import report, trial
from crash.notes import PHASES
from crash.plans import MODES, Plan, draw
from crash.state import RANKS, differences, state
from crash.trial import Result

import shardkeep as sk
from shardkeep import settings
from shardkeep.testing import simulated_ranks

ROOT = Path(__file__).parents[2]


@pytest.mark.smoke
def test_the_newest_committed_step_is_whole_after_a_kill_at_any_moment(tmp_path):
    results = tmp_path / "results.jsonl"
    earlier = Result(2026, 0, "sync", "all", "write", 1, 1, None, [])
    results.write_text(f"{earlier.line()}\n")  # the run continues after it
    done = subprocess.run(
        [sys.executable, "-m", "crash", "--results", str(results), "--moments=9"],
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [Result.of(line) for line in results.read_text().splitlines()]
    assert found[0] == earlier
    assert not any(one.wrong for one in found)
    assert "**9 moments, 0 failures**" in done.stdout
    assert {one.mode for one in found} == set(MODES)
    assert len({one.number for one in found}) == len(found) == 9


def saved(folder: Path, of: int, **changed) -> None:
    simulated_ranks.run(
        RANKS, lambda job: sk.save({**state(of, job.rank), **changed}, folder, ranks=job)
    )


def test_a_step_that_differs_from_what_was_saved_is_detected(tmp_path):
    plan = Plan(1, 0, "sync", tmp_path, "all", 0, 1, None, 0.0)
    assert trial._newest(plan) == (0, [])
    saved(tmp_path / "step_1", 1)
    saved(tmp_path / "step_2", 2)
    assert trial._newest(plan) == (2, [])
    (data,) = tmp_path.glob("step_2/__3_0_*")
    content = bytearray(data.read_bytes())
    content[5000] ^= 1
    data.write_bytes(content)
    step, wrong = trial._newest(plan)
    assert step == 2
    assert data.name in wrong[0]
    (tmp_path / "step_2" / ".metadata").unlink()
    assert trial._newest(plan) == (1, [])
    saved(tmp_path / "step_3", 2)
    assert trial._newest(plan) == (2, ["step 2 is in step_3"])
    saved(tmp_path / "step_4", 3, step=4)
    assert trial._newest(plan)[1][0] == "shared differs from what was saved"


def test_a_single_changed_bit_is_detected():
    whole: dict = {}
    for rank in range(RANKS):
        whole |= state(7, rank)
    assert differences(whole, 7) == []
    whole["rank_2"]["weight"].view(torch.int32)[17] ^= 1
    assert differences(whole, 7) == ["rank_2"]


def test_leftover_files_are_detected(tmp_path):
    plan = Plan(1, 0, "overwrite", tmp_path, "all", 0, 1, None, 0.0)
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / f"__0_0_{'a' * 32}.distcp").touch()
    assert trial._left_over(plan, 1) == []
    (tmp_path / "last" / f".lease_{'d' * 32}.json").touch()
    assert trial._left_over(plan, 1) == ["there are files of 2 saves"]


def test_moments_are_spread_over_phases_ranks_and_modes():
    spans = {(mode, phase): 1.0 for mode in MODES for phase in (*PHASES[1:], "life")}
    plans = [draw(1, number, Path(), RANKS, spans) for number in range(1000)]
    assert {plan.mode for plan in plans} == set(MODES)
    assert {plan.whom for plan in plans} == {"one", "all"}
    assert {plan.rank for plan in plans} == set(range(RANKS))
    assert {plan.phase for plan in plans} == {None, *PHASES[1:]}
    assert plans == [draw(1, number, Path(), RANKS, spans) for number in range(1000)]
    assert plans != [draw(2, number, Path(), RANKS, spans) for number in range(1000)]


def test_the_report_names_failures(tmp_path, monkeypatch):
    good = Result(5, 0, "sync", "one", "write", 1, 1, 0.5, [])
    bad = Result(5, 1, "async", "all", "publish", 3, 2, None, ["step 2 is there"])
    text = report.summary([good, bad])
    assert "**2 moments, 1 failures**" in text
    assert "- moment 1 of seed 5 (async, all, publish): step 2 is there" in text
    assert "The heartbeat was 0.1 s and the deadline 1.5 s. The defaults are" in text
    defaults = {"SHARDKEEP_HEARTBEAT_SECONDS": "1.5 s", "SHARDKEEP_DEADLINE_SECONDS": "1,800 s"}
    for name in defaults:
        monkeypatch.delenv(name, raising=False)
    in_force = [f"{settings.heartbeat_seconds():g} s", f"{settings.deadline_seconds():,.0f} s"]
    assert in_force == [*defaults.values()]
    assert "{} and {}".format(*defaults.values()) in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(page, text)
    assert page.read_text() == f"before\n{report.BEGIN}\n{text}\n{report.END}\nafter\n"


def test_a_manager_that_keeps_too_many_steps_is_detected(tmp_path):
    plan = Plan(1, 0, "manager", tmp_path, "all", 0, 1, None, 0.0)
    for step in (4, 5):
        (tmp_path / f"step_{step}").mkdir()
    assert trial._left_over(plan, 5) == []
    (tmp_path / "step_3").mkdir()
    assert trial._left_over(plan, 5) == ["there are steps [5, 4, 3], not [5, 4]"]
