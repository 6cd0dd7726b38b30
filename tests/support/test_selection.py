"""Tests that are split among several runs are all run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from support import selection

CONFTEST = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from support import selection
pytest_addoption = selection.add_options
def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(selection.RunRecorder(Path("record")))
"""

CASES = """
import pytest
@pytest.mark.parametrize("n", ["a", "b @c", "d e"])
def test_passes(n):
    assert n
def test_is_skipped():
    pytest.skip("not here")
def test_fails():
    assert False
@pytest.mark.xdist_group("gloo")
def test_in_a_group():
    pass
"""
PASSED = ["test_in_a_group", "test_passes[a]", "test_passes[b @c]", "test_passes[d e]"]


def test_a_parallel_run_records_passed_and_skipped_tests(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text(CONFTEST.format(tests=str(Path(__file__).parents[1])))
    (tmp_path / "test_cases.py").write_text(CASES)
    options = ["-q", "-n1", "--dist=loadgroup", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert (tmp_path / "record").read_text().splitlines() == [
        *(f"passed test_cases.py::{name}" for name in PASSED),
        "skipped test_cases.py::test_is_skipped",
    ]


def configured(file: Path) -> tuple[SimpleNamespace, list]:
    """Return a configuration with `--leave-out`, and the list of items that pytest deselects."""
    left_out: list = []

    def pytest_deselected(items: list) -> None:
        left_out.extend(items)

    hook = SimpleNamespace(pytest_deselected=pytest_deselected)
    return SimpleNamespace(getoption=lambda name: str(file), hook=hook), left_out


def test_only_tests_that_passed_are_left_out(tmp_path):
    (tmp_path / "record").write_text("passed t.py::a\nskipped t.py::b\n")
    items = [SimpleNamespace(nodeid=f"t.py::{name}") for name in "abc"]
    config, left_out = configured(tmp_path / "record")
    remaining = list(items)
    selection.leave_out_listed(config, remaining)
    assert (left_out, remaining) == (items[:1], items[1:])


def test_a_record_without_passed_tests_is_refused(tmp_path):
    (tmp_path / "record").write_text("skipped t.py::b\n")
    config, _ = configured(tmp_path / "record")
    with pytest.raises(pytest.UsageError, match="names no test that passed"):
        selection.leave_out_listed(config, [])


def test_a_test_that_no_run_has_is_named(tmp_path, capsys):
    (tmp_path / "collected").write_text("t.py::a\nt.py::b\nt.py::c[x y]\n\n3 tests collected\n")
    (tmp_path / "first").write_text("passed t.py::a\n")
    (tmp_path / "second").write_text("skipped t.py::b\n")
    arguments = [str(tmp_path / name) for name in ("collected", "first", "second")]
    assert selection.main(arguments) == 1
    assert capsys.readouterr().out == "no run has this test: t.py::c[x y]\n"
    (tmp_path / "second").write_text("skipped t.py::b\npassed t.py::c[x y]\n")
    assert selection.main(arguments) == 0
