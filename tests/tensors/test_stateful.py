"""Objects with a state of their own inside a state."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from shardkeep.tensors.stateful import expand, restore  # noqa: E402


class Counter:
    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Reader:
    """Has a state that can't be set."""

    def state_dict(self) -> dict[str, Any]:
        raise AssertionError


def test_objects_with_a_state_are_replaced_and_get_it_back() -> None:
    counter, reader = Counter(3), Reader()
    state = OrderedDict([("a", 1), ("c", counter), ("nested", {"c": counter}), ("r", reader)])
    plain, statefuls = expand(state)
    assert type(plain) is OrderedDict
    assert list(plain.items()) == [
        ("a", 1), ("c", {"count": 3}), ("nested", {"c": counter}), ("r", reader)
    ]  # fmt: skip
    assert statefuls == {"c": counter}
    assert state["c"] is counter
    plain["a"], plain["c"]["count"] = 2, 7
    restore(state, plain, statefuls)
    assert (state["a"], state["c"], counter.count) == (2, counter, 7)


def test_a_plain_state_is_not_copied() -> None:
    state = {"a": torch.ones(1), "b": {"c": 1}}
    plain, statefuls = expand(state)
    assert plain is state
    restore(state, plain, statefuls)
    assert list(state) == ["a", "b"]


def test_modules_and_optimizers() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = {"model": model, "optimizer": optimizer}
    plain, statefuls = expand(state)
    assert set(plain["model"]) == {"weight", "bias"}
    plain["optimizer"]["param_groups"][0]["lr"] = 0.5
    with torch.no_grad():
        plain["model"]["weight"].fill_(4)
    restore(state, plain, statefuls)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert (model.weight == 4).all()
    assert state == {"model": model, "optimizer": optimizer}
