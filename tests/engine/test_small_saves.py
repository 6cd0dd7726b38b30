"""The number of Python calls that a save makes for each small tensor is limited."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import torch.distributed.checkpoint as stock

import shardkeep as sk
from shardkeep.checkpoint import commit
from shardkeep.coordination import detect_ranks
from shardkeep.engine.negotiate import negotiate_writers, report
from shardkeep.io.write.written import Written
from shardkeep.stores import MemoryStore
from shardkeep.torch_state.describe import describe_state
from shardkeep.torch_state.payloads import StatePayloads


def state(count: int) -> dict[str, Any]:
    """Return containers of two small tensors, with few different keys."""
    layers: dict[str, dict[str, Any]] = {}
    for row, (weight, bias) in enumerate(torch.zeros(count, 2, 16)):
        layers.setdefault(str(row // 40), {})[str(row % 40)] = {"weight": weight, "bias": bias}
    return {"layers": layers}


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the calls of Python functions in the block, and the resumptions of generators."""
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


def negotiated(count: int) -> Callable[[], None]:
    """Return a function that runs a save without writing, for a state that is described already."""
    claim = describe_state(state(count)).claim

    def run() -> None:
        with detect_ranks(None).session("save", "memory") as session:
            order = negotiate_writers(session, claim, lambda: None)
            reports = report(session, order, written(len(order.pieces)))
            assert reports is not None
            commit.publish(MemoryStore(), order.save_id, reports.index, {})

    return run


def described(count: int) -> Callable[[], None]:
    given = state(count)

    def run() -> None:
        local = describe_state(given)
        assert StatePayloads(local.memory, local.addresses).addresses.all()

    return run


@pytest.mark.parametrize(("work", "limit"), [(described, 2.1), (negotiated, 0.05)])
def test_the_number_of_calls_for_each_tensor_is_limited(
    work: Callable[[int], Callable[[], None]], limit: float
) -> None:
    counts = []
    for size in (500, 1500):
        run = work(size)
        run()  # imports and caches of the first call
        with counted() as calls:
            run()
        counts.append(calls[0])
    assert (counts[1] - counts[0]) / 2000 <= limit


KINDS = st.tuples(
    st.lists(st.sampled_from([0, 1, 2, 3, 7, 40]), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64]),
    st.sampled_from(["plain", "every second", "transposed", "conjugate"]),
)


def tensor(kind: tuple[list[int], torch.dtype, str], seed: int) -> torch.Tensor:
    shape, dtype, how = kind
    generator = torch.Generator().manual_seed(seed)
    double = torch.randint(0, 2, (2, *shape), generator=generator).to(dtype)
    if how == "every second" and shape:
        return torch.stack([*double], dim=-1)[..., 0]
    if how == "transposed":
        return double[0].permute([*reversed(range(len(shape)))])
    return double[0].conj() if how == "conjugate" else double[0].clone()


@settings(max_examples=40)
@given(
    st.lists(st.tuples(KINDS, st.integers(1, 30)), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([None, 1 << 20]),
)
def test_many_small_tensors_are_loaded_as_they_were_saved(
    tmp_path_factory: pytest.TempPathFactory,
    runs: list[tuple[Any, int]],
    staged: bool,
    budget: int | None,
) -> None:
    """The tensors include empty ones, which have no memory, and non-contiguous ones."""
    path = tmp_path_factory.mktemp("small")
    kinds = [kind for kind, count in runs for _ in range(count)]
    given = {f"t{row}": tensor(kind, row) for row, kind in enumerate(kinds)}
    if staged:
        sk.async_save(given, path, max_host_memory=budget and 64 * budget).result(60)
    else:
        sk.save(given, path, max_host_memory=budget)
    assert sk.open(path).verify().ok
    for load in (sk.load, stock.load):
        into = {name: torch.ones(one.shape, dtype=one.dtype) for name, one in given.items()}
        load(into, checkpoint_id=path) if load is stock.load else load(into, path)
        for name, one in given.items():
            assert torch.equal(into[name], one), name
