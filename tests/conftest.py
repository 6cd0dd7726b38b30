"""Fixtures for all tests."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from shardkeep.testing import simulated_ranks
from support.gloo import Pool


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


def pytest_configure() -> None:
    # How long an example takes says something of what else the machine does, nothing of the code.
    settings.register_profile(
        "any pace", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("any pace")
    # Who runs this in the background of a shell has it ignored, and Ctrl-C is tested here.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gloo" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gloo)
            item.add_marker(pytest.mark.torch)
