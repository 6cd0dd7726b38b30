"""Small tensors cost columns, not calls: what is done for each of them, counted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from shardkeep import commit
from shardkeep.agreement import own, report
from shardkeep.io.write import Written
from shardkeep.ranks import take_part
from shardkeep.stores import MemoryStore
from shardkeep.tensors.payloads import StatePayloads
from shardkeep.tensors.state import describe_state


def state(count: int) -> dict[str, Any]:
    """Containers of two small tensors, with few different keys."""
    layers: dict[str, dict[str, Any]] = {}
    for row, (weight, bias) in enumerate(torch.zeros(count, 2, 16)):
        layers.setdefault(str(row // 40), {})[str(row % 40)] = {"weight": weight, "bias": bias}
    return {"layers": layers}


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts the calls of Python functions in its block, and how often generators go on."""
    calls = [0]

    def count(frame: Any, event: str, argument: Any) -> None:
        calls[0] += event == "call"

    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def written(count: int) -> Written:
    rows = np.arange(count)
    return Written(
        ("data",), rows.astype(np.int32) * 0, rows * 500, rows * 0 + 500, rows * 500 + 300,
        np.arange(count + 1), rows.astype(np.uint32), rows.astype(np.uint32),
    )  # fmt: skip


def settled(count: int) -> Callable[[], None]:
    """All of a save but the writing, for a state that is described already."""
    claim = describe_state(state(count)).claim

    def run() -> None:
        with take_part(None).session("save", "memory") as session:
            order = own(session, claim, lambda: None)
            index = report(session, order, written(len(order.pieces)))
            assert index is not None
            commit.publish(MemoryStore(), order.save_id, index, {})

    return run


def described(count: int) -> Callable[[], None]:
    given = state(count)

    def run() -> None:
        local = describe_state(given)
        assert StatePayloads(local.memory, local.addresses).addresses.all()

    return run


@pytest.mark.parametrize(("work", "limit"), [(described, 2.1), (settled, 0.05)])
def test_calls_for_each_tensor(work: Callable[[int], Callable[[], None]], limit: float) -> None:
    counts = []
    for size in (500, 1500):
        run = work(size)
        run()  # whatever is imported or cached at first
        with counted() as calls:
            run()
        counts.append(calls[0])
    assert (counts[1] - counts[0]) / 2000 <= limit
