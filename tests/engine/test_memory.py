"""Saves and loads stay within their memory budget and leak nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux"),
]

from support.memory import BUDGET, MIB

OVERHEAD = MIB
"""The memory of Python for plans and messages, which does not depend on the size of the state."""


def measured(kind: str, path: Path) -> dict:
    tests = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    command = [sys.executable, "-m", "support.memory", kind, str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_stays_within_the_budget(tmp_path):
    found = measured("peaks", tmp_path)
    resharded = ["reshard True", "reshard False"]
    others = ["load cast", "save light", "export", "slice"]
    assert list(found) == ["save", "async", "load", *resharded, *others]
    for what, extra in found.items():
        assert extra <= BUDGET * 1.05 + OVERHEAD, (what, extra / MIB, found)


def test_two_hundred_saves_leak_no_memory(tmp_path):
    sizes = np.array(measured("growth", tmp_path)["sizes"])
    slope = np.polyfit(np.arange(len(sizes)), sizes, 1)[0]
    assert slope < 16 * 1024, f"{slope / 1024:.0f} KiB more after each save"
