"""Exactly one of several saves that commit to one path at the same time succeeds.

Two processes save. Each waits just before it writes its commit record, and then both continue.
`COMMIT_RACES=1000` runs as many races as docs/decisions reports.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import torch.distributed.checkpoint as stock

import shardkeep as sk
from shardkeep.checkpoint.commit import data_file
from shardkeep.format.dcp.trailer import manifest_name
from support.racing import Outcome, Racer, racers

RACES = int(os.environ.get("COMMIT_RACES", "24"))

KINDS = {
    # existing checkpoint, overwrite, API that saves, error of the loser
    "new path": ("nothing", False, "save", "AlreadyExists"),
    "new path, overwriting": ("nothing", True, "save", "Replaced"),
    "over a checkpoint": ("ours", True, "save", "Replaced"),
    "over one of stock torch": ("stock", True, "save", "Replaced"),
    "drop-in, new path": ("nothing", False, "dcp", "CheckpointExists"),
    "drop-in, over a checkpoint": ("ours", True, "dcp", "Replaced"),
}


@pytest.fixture(scope="module")
def pair():
    with racers() as started:
        yield started


def prepare(path: Path, before: str) -> None:
    state = {"w": torch.full((20,), -1.0), "n": -1}
    if before == "ours":
        sk.save(state, path)
    elif before == "stock":
        stock.save(state, checkpoint_id=path, no_dist=True)


def race(pair: list[Racer], path: Path, kind: str, first: int) -> tuple[Outcome, Outcome, int]:
    """Run one race; return the outcomes of winner and loser, and the number of the winner."""
    before, overwrite, how, _ = KINDS[kind]
    prepare(path, before)
    for seed, racer in enumerate(pair):
        racer.start(path, seed, overwrite=overwrite, how=how)
    for racer in pair:
        racer.wait()
    for number in (first, 1 - first):
        pair[number].go()
    ends = [racer.finish() for racer in pair]
    won = [number for number, end in enumerate(ends) if end.end == "saved"]
    assert len(won) == 1, ends
    return ends[won[0]], ends[1 - won[0]], won[0]


@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_exactly_one_of_two_saves_commits_and_the_other_touches_none_of_its_files(tmp_path, pair):
    wins: Counter[int] = Counter()
    for number in range(RACES):
        kind = list(KINDS)[number % len(KINDS)]
        path = tmp_path / f"race_{number}"
        winner, loser, which = race(pair, path, kind, first=number // len(KINDS) % 2)
        assert loser.end == KINDS[kind][3], (kind, loser)
        assert str(path) in loser.text
        left = {file.name for file in path.iterdir()}
        assert ".metadata" in left
        assert manifest_name(winner.save_id) in left
        assert left == {".metadata", manifest_name(winner.save_id), data_file(0, 0, winner.save_id)}
        checkpoint = sk.open(path)
        assert checkpoint.verify().ok
        assert checkpoint.read("n") == which
        assert checkpoint.read("w").tolist() == [float(value + which) for value in range(20)]
        wins[which] += 1
        shutil.rmtree(path)
    assert RACES < 20 or min(wins[0], wins[1]) > 0, "both processes win some races"


def test_a_late_commit_of_a_stale_job_does_not_replace_a_newer_checkpoint(tmp_path, pair):
    """The stale job tries to commit long after the new job has finished its save."""
    zombie, job = pair
    path = tmp_path / "step_1"
    for seed, racer in enumerate(pair):
        racer.start(path, seed, overwrite=False)
    for racer in pair:
        racer.wait()
    job.go()
    saved = job.finish()
    assert saved.end == "saved"
    before = {file.name: file.read_bytes() for file in path.iterdir() if "lease" not in file.name}
    zombie.go()
    late = zombie.finish()
    assert late.end == "AlreadyExists"
    assert late.text == (
        f"{path}: another save committed a checkpoint there while this one was being written; "
        "that checkpoint was not changed, and nothing of this save was committed. Save to another "
        "path, or pass overwrite=True to replace it"
    )
    after = {file.name: file.read_bytes() for file in path.iterdir()}
    mine = {name: data for name, data in before.items() if saved.save_id in name}
    assert {**mine, ".metadata": before[".metadata"]} == after
    assert sk.open(path).verify().ok


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGSTOP"])
def test_a_dead_or_stopped_process_does_not_keep_others_from_committing(tmp_path, signal):
    import signal as signals

    path = tmp_path / "step_1"
    prepare(path, "ours")
    with racers() as (stopped, other):
        for seed, racer in enumerate((stopped, other)):
            racer.start(path, seed, overwrite=True)
            racer.wait()
        stopped.process.send_signal(signals.Signals[signal])
        other.go()
        assert other.finish().end == "saved"
        assert sk.open(path).read("n") == 1
        stopped.process.send_signal(signals.SIGKILL)
