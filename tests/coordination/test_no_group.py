"""Saves use no process group: training continues beside them, and parts of a job save alone."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.gloo]

import shardkeep as sk
from support import beside, jobs


def test_collectives_of_another_thread_do_not_disturb_a_save(gloo, tmp_path):
    saves = 60
    rounds = gloo.run(beside.training, str(tmp_path / "ckpt"), saves)
    assert len(set(rounds)) == 1
    assert rounds[0] > saves
    ckpt = sk.open(tmp_path / "ckpt")
    assert ckpt.verify().ok
    assert ckpt["n"].value == saves - 1
    assert len(list((tmp_path / "ckpt").iterdir())) == 6  # four of data, manifest, .metadata


def test_parts_of_a_job_save_at_the_same_time(gloo, tmp_path):
    ends = gloo.run(beside.halves, str(tmp_path), 3)
    assert ends[:2] == [["saved"] * 3] * 2
    assert ends[2] == ["saved", "told of 3", "told of 3"]
    assert ends[3] == ["saved", "raised", "raised"]
    for name in ("0/0", "0/1", "0/2", "1/0", *(f"alone{rank}" for rank in range(4))):
        assert sk.open(tmp_path / name).verify().ok
    assert [sk.open(tmp_path / f"{half}/0")["half"].value for half in (0, 1)] == [0, 1]
    for number in (1, 2):
        with pytest.raises(sk.NotACheckpoint):
            sk.open(tmp_path / f"1/{number}")


@pytest.mark.parametrize("layout", ["ddp", "hsdp"])
def test_replicated_layouts_are_written_once(gloo, tmp_path, layout):
    path = str(tmp_path / "ckpt")
    saved = gloo.run(jobs.save, path, layout)
    assert all(one["leaves"] == saved[0]["leaves"] for one in saved)
    assert sum(one["written"] for one in saved) == sum(
        file.stat().st_size for file in (tmp_path / "ckpt").glob("*.distcp")
    )
    for loaded in gloo.run(jobs.load, path, layout, False):
        assert loaded["ours"] == saved[0]["leaves"]
