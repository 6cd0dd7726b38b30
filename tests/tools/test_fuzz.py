"""A short run of the fuzzer, and that it can find something."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REGRESSIONS = ROOT / "fuzz" / "regressions"

from fuzz.mutators import MUTATORS
from fuzz.targets import TARGETS
from fuzz.worker import Fuzzer, seeds

from shardkeep.errors import Damaged, FormatError


def targets():
    for name in TARGETS:
        yield pytest.param(name, marks=[pytest.mark.torch] if name == "torch object" else [])


@pytest.mark.parametrize("target", list(targets()))
def test_the_corpus_is_valid(target):
    if target == "torch object":
        pytest.importorskip("torch")
    corpus = list(seeds(target))
    assert corpus
    for data in corpus:
        TARGETS[target](data)


@pytest.mark.smoke
@pytest.mark.parametrize("case", sorted(REGRESSIONS.glob("*/*")), ids=lambda file: file.name)
def test_earlier_findings_stay_fixed(case):
    with pytest.raises((FormatError, Damaged)):
        TARGETS[case.parent.name.replace("-", " ")](case.read_bytes())


@pytest.mark.smoke
def test_a_thousand_cases_find_nothing(tmp_path):
    command = [sys.executable, "-m", "fuzz", "--cases", "1200", "--seed", "0", "--jobs", "2"]
    path = f"{ROOT}:{ROOT / 'src'}"
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env={"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 findings" in done.stdout


def test_cases_follow_from_the_seed():
    for target in MUTATORS:
        one, same, other = (Fuzzer(target, seed) for seed in (1, 1, 2))
        cases = [[fuzzer.case() for _ in range(20)] for fuzzer in (one, same, other)]
        assert cases[0] == cases[1] != cases[2]


GUARDED = """
import sys
from fuzz import guard, worker
fuzzer = worker.Fuzzer("lease", 1)
guard.limit_memory()
guard.watch()
def system(data):
    import os
    os.system("true")
def eats(data):
    return bytes(2 << 30)
def hangs(data):
    while True:
        pass
def crashes(data):
    raise KeyError("x")
def fine(data):
    return len(data)
guard.SECONDS = 0.2
for run in (system, eats, hangs, crashes, fine):
    fuzzer.run = run
    print(fuzzer.check(b"x"), fuzzer.found[-1].strip().splitlines()[-1])
"""


def test_forbidden_actions_of_a_case_are_detected():
    path = f"{ROOT}:{ROOT / 'src'}"
    done = subprocess.run(
        [sys.executable, "-c", GUARDED],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": path},
    )
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["False"] * 4 + ["True"], done.stderr
    names = ("os.system", "MemoryError", "TooLong", "KeyError")
    assert all(name in line for name, line in zip(names, lines, strict=False)), lines


@pytest.mark.parametrize("target", ["metadata", "manifest", "tensor item", "object item"])
def test_cases_get_past_the_first_check(target):
    fuzzer = Fuzzer(target, 3)
    for _ in range(300):
        try:
            fuzzer.run(fuzzer.case())
            fuzzer.ways["a value"] += 1
        except (FormatError, Damaged) as error:
            fuzzer.ways[str(error)] += 1
    assert len(fuzzer.ways) > 25
    assert fuzzer.ways["a value"] > 5
