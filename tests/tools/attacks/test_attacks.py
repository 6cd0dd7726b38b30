"""Every malicious checkpoint is refused or opens as inert data, fast and in little memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from attacks.make import ATTACKS, CANARY

SECONDS = 1.0
"""Processor time, so that other work on the machine does not fail the test."""
MEMORY = 100 << 20


@pytest.fixture(scope="module")
def visits(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """The result of each attack by name, from one process for all attacks."""
    root = tmp_path_factory.mktemp("attacks")
    for name, attack in ATTACKS.items():
        folder = root / "in" / name
        folder.mkdir(parents=True)
        attack.build(folder)
    (root / "out").mkdir()
    command = [sys.executable, str(Path(__file__).with_name("drive.py")), str(root / "in")]
    done = subprocess.run(
        command, cwd=root / "out", capture_output=True, text=True, timeout=280, check=False
    )
    found: dict[str, Any] = {"": {"canary": (root / "out" / CANARY).exists()}}
    for line in done.stdout.splitlines():
        report = json.loads(line)
        found[report["name"]] = report
    unfinished = [name for name, report in found.items() if len(report) == 1 and name]
    assert not unfinished, f"died in {unfinished[-1]} with {done.returncode}: {done.stderr[-2000:]}"
    return found


def test_nothing_is_executed(visits: Mapping[str, Any]) -> None:
    assert not visits[""]["canary"]


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused_or_inert(name: str, visits: Mapping[str, Any]) -> None:
    attack, visit = ATTACKS[name], visits[name]
    assert not visit["crashes"], "\n".join(visit["crashes"])
    if attack.error:
        messages = "\n".join(visit["errors"])
        assert re.search(attack.error, messages), messages or "it opened"
        assert not visit["vague"], f"no file is named: {visit['vague']}"
    else:
        assert not visit["errors"]
    assert visit["seconds"] < SECONDS
    assert visit["bytes"] < MEMORY


@pytest.mark.parametrize(
    "name",
    [name for name, attack in ATTACKS.items() if name.startswith("object_") and not attack.error],
)
def test_code_becomes_a_stand_in(name: str, visits: Mapping[str, Any]) -> None:
    assert visits[name]["opaque"], "the refused class is not shown"


def test_there_are_enough() -> None:
    assert len(ATTACKS) >= 25
    assert all(attack.what and len(attack.what) < 100 for attack in ATTACKS.values())
