"""A small run of the demo, and that its claims can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from demo import claims
from demo.claims import Killed, Run
from demo.recorder import Holdings, leaves

ROOT = Path(__file__).parents[2]


# Steps take about 20 ms here; the kill comes many steps before the next save.
SMALL = "--ranks 2 --then 1 --steps 40 --save-every 20 --kill-at 23 --batch 4 --width 32 --layers 1"


def command(out):
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    return [sys.executable, "-m", "demo", "--out", str(out), "--below=6", *SMALL.split()]


def pids(out):
    log = out / "run" / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [record["pid"] for record in map(json.loads, lines) if "pid" in record]


def assert_gone(some_pids):
    for pid in some_pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.torch
@pytest.mark.gloo
def test_small_demo_trains_is_killed_resumes_on_one_rank_and_holds_every_claim(tmp_path):
    done = subprocess.run(
        command(tmp_path), check=False, cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 of 8 claims hold" in done.stdout
    assert "SIGKILL ended 3 of 3 processes" in done.stdout
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(pids(tmp_path)) == 3
    assert_gone(pids(tmp_path))


@pytest.mark.torch
@pytest.mark.gloo
def test_demo_that_is_stopped_leaves_no_process_behind(tmp_path):
    with subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE) as demo:
        while demo.poll() is None and len(pids(tmp_path)) < 2:
            time.sleep(0.1)
        demo.terminate()
        demo.communicate(timeout=60)
    assert demo.returncode == 143
    assert len(pids(tmp_path)) == 2
    assert_gone(pids(tmp_path))


def run(ranks=2, *, losses, first=1, saves=(), **more):
    steps = [{"step": first + k, "loss": loss, "lr": 0.1} for k, loss in enumerate(losses)]
    return Run(ranks, steps, [{"saved": s, "seconds": 1.0, "path": "p"} for s in saves], **more)


HOLDINGS = Holdings({"a": np.array([0.0, np.nan]), "n": np.array(3)}, {"lr": 0.1, "b": [1, 2]})


@pytest.mark.smoke
def test_recordings_of_ranks_are_merged_and_contradictions_refused(tmp_path):
    HOLDINGS.write(tmp_path, 0)
    Holdings({"own": np.array([1], np.uint8)}, {"lr": 0.1}).write(tmp_path, 1)
    read = Holdings.read(tmp_path)
    assert read.tensors.keys() == {"a", "n", "own"}
    assert HOLDINGS.compare(read.tensors, read.values).differ == ["own"]
    Holdings({"n": np.array(4)}, {}).write(tmp_path, 2)
    with pytest.raises(ValueError, match="the ranks hold different tensors 'n'"):
        Holdings.read(tmp_path)


@pytest.mark.smoke
def test_the_comparison_detects_single_bits():
    same = HOLDINGS.compare({"a": np.array([0.0, np.nan]), "n": np.array(3)}, {"b": (1, 2)})
    assert (same.tensors, same.nbytes) == (["a", "n"], 24)
    assert (same.values, same.differ, same.absent) == (["b"], [], ["lr"])
    for other in ([-0.0, np.nan], [0.0, -np.nan], [0.0]):
        assert HOLDINGS.compare({"a": np.array(other)}, {}).differ == ["a"]
    assert HOLDINGS.compare({"a": np.array([0.0, np.nan], np.float32)}, {}).differ == ["a"]
    assert HOLDINGS.compare({}, {"lr": 0.1 + 1e-16, "b": [2, 1], "c": 0}).differ == ["b", "c", "lr"]


def test_names_are_those_of_dcp():
    state = {"a": {"b": 1, 0: [2, 3]}, "groups": [{"lr": 4, "betas": (5, 6)}]}
    named = {"a.b": 1, "a.0": [2, 3], "groups.0.lr": 4, "groups.0.betas": (5, 6)}
    assert dict(leaves(state)) == named


def test_a_process_that_survives_or_a_folder_that_does_not_open_is_seen():
    killed = run(losses=[3.0, 2.0, 1.0], saves=[2])
    good = Killed([9, 9, 9], 0.1, left=0, folders=1, opened=1)
    assert claims.nothing_left(killed, good).holds
    for bad in (
        Killed([9, 9, 15], 0.1, left=0, folders=1, opened=1),
        Killed([9, 9], 0.1, left=0, folders=1, opened=1),
        Killed([9, 9, 9], 0.1, left=1, folders=1, opened=1),
        Killed([9, 9, 9], 0.1, left=0, folders=2, opened=1),
    ):
        assert not claims.nothing_left(killed, bad).holds


def test_a_lost_step_that_comes_out_differently_is_seen():
    before = run(losses=[3.0, 2.0, 1.0], saves=[1])
    assert claims.repeats(run(losses=[2.0, 1.0, 0.5], first=2), before).holds
    assert not claims.repeats(run(losses=[2.0, 1.0 + 1e-15, 0.5], first=2), before).holds
    assert not claims.repeats(run(losses=[1.0, 0.5], first=3), before).holds


def test_a_loss_that_jumps_or_a_schedule_that_starts_anew_is_seen():
    reference = run(losses=[2.0, 1.9])
    assert claims.goes_on(run(losses=[2.01, 1.9]), reference).holds
    assert not claims.goes_on(run(losses=[2.3, 2.0]), reference).holds
    assert not claims.goes_on(run(losses=[2.0]), reference).holds
    other = run(losses=[2.0, 1.9])
    other.steps[1]["lr"] = 0.2
    assert not claims.goes_on(other, reference).holds
    assert claims.learns(run(losses=[5.5]), run(losses=[2.0]), below=2.5).holds
    assert not claims.learns(run(losses=[5.5]), run(losses=[2.6]), below=2.5).holds


def test_a_rank_that_holds_something_else_is_seen():
    names = ["model.w", "optimizer.state.w.exp_avg", "optimizer.state.w.step", "rng.rank_0"]
    before = run(ranks=2, losses=[1.0], saves=[1])

    def claim(path="step_1", ranks=1, **changed):
        found = {"tensors": names, "nbytes": 4, "values": ["lr"], "differ": []}
        found |= {"absent": ["rng.rank_1"]} | changed
        after = run(
            ranks=ranks,
            losses=[1.0],
            resumed={"resumed": 1, "seconds": 1.0, "path": path},
            compared=[{"compared": found, "resharded": 1}],
        )
        return claims.holds_the_same(after, before, Path("step_1"))

    assert claim().holds
    assert not claim(differ=["model.w"]).holds
    assert not claim(absent=["rng.rank_1", "model.v"]).holds
    assert not claim(tensors=names[:1]).holds
    assert not claim(path="step_2").holds
    assert not claim(ranks=2).holds


@pytest.mark.parametrize(
    "changed",
    [
        {"differ": ["a"]},
        {"absent": ["a"]},
        {"tensors": []},
        {"imported": ["torch", "shardkeep"]},
    ],
)
def test_a_reader_that_finds_something_else_or_imports_torch_is_seen(changed):
    found = {"tensors": ["a"], "nbytes": 4, "values": [], "differ": [], "absent": []}
    found |= {"seconds": 1.0, "imported": ["shardkeep"], "version": "1"}
    assert claims.reads_the_same("bare", found).holds
    assert not claims.reads_the_same("bare", found | changed).holds
