"""Splitting the tests among runs loses none of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support import selection

TESTS = Path(__file__).parents[1]

CONFTEST = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from support import selection
def pytest_addoption(parser):
    selection.add_options(parser)
def pytest_configure(config):
    file = config.getoption("--record-run")
    if file and not hasattr(config, "workerinput"):
        config.pluginmanager.register(selection.RunRecorder(Path(file)))
def pytest_collection_modifyitems(config, items):
    selection.leave_out_listed(config, items)
"""

CASES = """
import pytest
@pytest.mark.parametrize("n", ["a", "b @c", "d e"])
def test_passes(n):
    assert n
def test_is_skipped():
    pytest.skip("not here")
@pytest.mark.xdist_group("gloo")
def test_in_a_group():
    pass
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text(CONFTEST.format(tests=str(TESTS)))
    (tmp_path / "test_cases.py").write_text(CASES)

    def run(*options):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        (tmp_path / "output").write_text(done.stdout)
        return done

    return run


@pytest.mark.parametrize("workers", [[], ["-n1", "--dist=loadgroup"]], ids=["plain", "xdist"])
def test_only_what_passed_is_left_out_of_the_next_run(run, tmp_path, workers):
    run(*workers, "--record-run=first")
    lines = (tmp_path / "first").read_text().splitlines()
    passed = [line.split("::")[1] for line in lines if line.startswith("passed ")]
    assert passed == ["test_in_a_group", *(f"test_passes[{n}]" for n in ("a", "b @c", "d e"))]
    assert "skipped test_cases.py::test_is_skipped" in lines
    assert "1 skipped, 4 deselected" in run("--leave-out=first").stdout


def test_a_test_that_no_run_has_is_named(run, tmp_path):
    run("-k", "not test_passes", "--record-run=first")
    run("--collect-only")
    collected = tmp_path / "output"
    missing = [
        name.split("::")[1] for name in selection.never_visited(collected, [tmp_path / "first"])
    ]
    assert missing == [f"test_passes[{n}]" for n in ("a", "b @c", "d e")]
    run("--record-run=second")
    records = [tmp_path / "first", tmp_path / "second"]
    assert selection.never_visited(collected, records) == []
    assert selection.main([str(collected), *map(str, records)]) == 0


def test_a_record_without_passed_tests_is_refused(run, tmp_path):
    (tmp_path / "empty").write_text("skipped test_cases.py::test_passes[a]\n")
    assert "names no test that passed" in run("--leave-out=empty").stderr
