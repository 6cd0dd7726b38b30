"""The death of a rank is reported within ten seconds with the default settings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.gloo]

import shardkeep as sk
from support import forked, phases
from support.waiting import PROMPT_SECONDS


def test_a_killed_rank_is_named_on_all_others_within_ten_seconds(tmp_path):
    """Kill a real process; most of the time is spent waiting for the default heartbeat."""
    if {
        "SHARDKEEP_HEARTBEAT_SECONDS",
        "SHARDKEEP_MAX_MISSED_HEARTBEATS",
        "SHARDKEEP_DEADLINE_SECONDS",
    } & os.environ.keys():
        pytest.skip("the environment changes the settings")
    path = str(tmp_path / "ckpt")
    ends = forked.run(phases.gone, "save", "write", 1, "killed", path, folder=tmp_path)
    happened = float(Path(f"{path}.happened").read_text())
    assert ends.pop(1) is None
    for end in ends:
        assert end is not None and (end["end"], end["rank"], end["phase"]) == ("told", 1, "write")
        assert "no heartbeat for 7.5 s" in end["cause"]
        assert end["at"] - happened < PROMPT_SECONDS
    assert sk.open(path)["number1"].value == 1  # the old checkpoint remains
