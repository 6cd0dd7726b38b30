"""Fixtures for all tests."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from shardkeep.testing import simulated_ranks
from support import selection
from support.gloo import Pool

TOOLS = Path(__file__).parent / "tools"


@pytest.fixture(scope="session")
def gloo() -> Iterator[Pool]:
    """Up to 4 real processes in a gloo group; see `support.gloo`."""
    pytest.importorskip("torch")
    with Pool() as pool:
        yield pool


@pytest.fixture(
    params=["threads", pytest.param("gloo", marks=[pytest.mark.gloo, pytest.mark.torch])]
)
def play(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[Any]]:
    """Run a scenario, `function(ranks, *args)`, on simulated and on real ranks.

    `play(function, *args, size=4, env={})` gives what each rank returned, in rank order.
    """
    if request.param == "gloo":
        pool: Pool = request.getfixturevalue("gloo")
        return pool.ranks

    def simulate(
        function: Callable[..., Any], *args: Any, size: int = 4, env: dict[str, str] | None = None
    ) -> list[Any]:
        for name, value in (env or {}).items():
            monkeypatch.setenv(name, value)
        return simulated_ranks.run(size, function, *args)

    return simulate


def pytest_addoption(parser: pytest.Parser) -> None:
    selection.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    # The duration of an example depends on the load of the machine, not on the code.
    settings.register_profile(
        "any pace", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("any pace")
    # A shell ignores SIGINT in background jobs, and some tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    record = config.getoption("--record-run")
    if record and not hasattr(config, "workerinput"):  # workers report to the first process
        config.pluginmanager.register(selection.RunRecorder(Path(record)))


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "gloo" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gloo)
            item.add_marker(pytest.mark.torch)
        if item.get_closest_marker("gloo"):
            # One worker runs them all: one pool of processes, and not two jobs at a time.
            item.add_marker(pytest.mark.xdist_group("gloo"))
        if item.path.parent == TOOLS and not item.get_closest_marker("smoke"):
            item.add_marker(pytest.mark.tools)
    selection.leave_out_listed(config, items)
