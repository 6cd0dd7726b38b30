"""The pool of processes for real ranks works as documented."""

from __future__ import annotations

import time

import pytest

from support.gloo import Failed, Pool


def add(rank: int, size: int, number: int) -> int:
    import torch
    from torch import distributed as dist

    total = torch.tensor([rank + number])
    dist.all_reduce(total)
    assert dist.get_world_size() == size
    return int(total) * 10 + rank


def misbehave(rank: int, size: int, how: str) -> object:
    if rank == 1 and how == "raise":
        raise ValueError("boom")
    if rank == 1 and how == "hang":
        time.sleep(1000)
    if rank == 1 and how == "unpicklable":
        return lambda: None
    return rank


@pytest.mark.parametrize("size", [4, 1, 2])
def test_results_are_returned_in_rank_order(gloo: Pool, size: int) -> None:
    total = sum(range(size)) + 5 * size
    assert gloo.run(add, 5, size=size) == [total * 10 + rank for rank in range(size)]


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("raise", "ValueError: boom"),
        ("hang", "in misbehave"),
        ("unpicklable", "pickle"),
    ],
)
def test_failures_are_reported_and_the_pool_stays_usable(gloo: Pool, how: str, text: str) -> None:
    with pytest.raises(Failed, match=text) as caught:
        gloo.run(misbehave, how, size=2, limit=5.0)
    assert list(caught.value.errors) == [1]
    assert caught.value.results == {0: 0}
    assert gloo.run(add, 1, size=2) == [30, 31]
