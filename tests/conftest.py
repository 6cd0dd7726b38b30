"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.gloo import Pool


@pytest.fixture(scope="session")
def gloo() -> Iterator[Pool]:
    """Up to 4 real processes in a gloo group; see `support.gloo`."""
    pytest.importorskip("torch")
    with Pool() as pool:
        yield pool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gloo" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gloo)
            item.add_marker(pytest.mark.torch)
