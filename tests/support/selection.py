"""Options of pytest that split the tests among several runs, without losing one.

`make test` first runs the tests that need no torch, where no torch is installed, and records them.
The run with torch leaves out those that passed there. `make test-list` compares all records with
what pytest collects.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

__all__ = ["RunRecorder", "add_options", "leave_out_listed", "never_visited"]

PASSED, SKIPPED = "passed ", "skipped "


def add_options(parser: pytest.Parser) -> None:
    """Add `--record-run` and `--leave-out` to pytest's command line."""
    group = parser.getgroup("selection of tests")
    group.addoption("--record-run", metavar="FILE", help="write which tests passed, were skipped")
    group.addoption("--leave-out", metavar="FILE", help="leave out what passed by that record")


class RunRecorder:
    """A pytest plugin that writes to a file which tests passed and which were skipped."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lines: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self._lines.add(SKIPPED + _plain(report.nodeid))
        elif report.when == "call" and report.passed:
            self._lines.add(PASSED + _plain(report.nodeid))

    def pytest_sessionfinish(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text("".join(f"{line}\n" for line in sorted(self._lines)))


def leave_out_listed(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that passed by the record that `--leave-out` names."""
    file = config.getoption("--leave-out")
    if not file:
        return
    passed = _names(Path(file), PASSED)
    if not passed:
        raise pytest.UsageError(f"--leave-out: {file} names no test that passed")
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = [item for item in items if item.nodeid not in passed]


def never_visited(collected: Path, records: Iterable[Path]) -> list[str]:
    """Return the tests that no recorded run has run or skipped.

    Args:
        collected: the output of `pytest --collect-only -q`.
        records: files that `--record-run` has written.
    """
    visited: set[str] = set()
    for file in records:
        visited |= _names(file, PASSED) | _names(file, SKIPPED)
    names = (line for line in collected.read_text().splitlines() if "::" in line)
    return [name for name in names if name not in visited]


def _plain(node_id: str) -> str:
    """Return the id without the group that pytest-xdist appends."""
    return node_id.removesuffix("@gloo")


def _names(file: Path, kind: str) -> set[str]:
    lines = file.read_text().splitlines()
    return {line.removeprefix(kind) for line in lines if line.startswith(kind)}


def main(arguments: list[str]) -> int:
    collected, *records = map(Path, arguments)
    missing = never_visited(collected, records)
    for name in missing:
        print(f"no run has this test: {name}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
