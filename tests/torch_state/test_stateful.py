"""Stateful objects inside a state."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from shardkeep.torch_state.stateful import (
    call_state_dicts,
    load_state_dicts,
    materialize_optimizer_state,
)
from shardkeep.types import DType


class Counter:
    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Reader:
    """An object whose state cannot be set."""

    def state_dict(self) -> dict[str, Any]:
        raise AssertionError


def test_stateful_objects_are_replaced_and_get_their_state_back() -> None:
    counter, reader = Counter(3), Reader()
    state = OrderedDict([("a", 1), ("c", counter), ("nested", {"c": counter}), ("r", reader)])
    plain, statefuls = call_state_dicts(state)
    assert type(plain) is OrderedDict
    assert list(plain.items()) == [
        ("a", 1), ("c", {"count": 3}), ("nested", {"c": counter}), ("r", reader)
    ]  # fmt: skip
    assert statefuls == {"c": counter}
    assert state["c"] is counter
    plain["a"], plain["c"]["count"] = 2, 7
    load_state_dicts(state, plain, statefuls)
    assert (state["a"], state["c"], counter.count) == (2, counter, 7)


def test_a_plain_state_is_not_copied() -> None:
    state = {"a": torch.ones(1), "b": {"c": 1}}
    plain, statefuls = call_state_dicts(state)
    assert plain is state
    load_state_dicts(state, plain, statefuls)
    assert list(state) == ["a", "b"]


def test_modules_and_optimizers() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = {"model": model, "optimizer": optimizer}
    plain, statefuls = call_state_dicts(state)
    assert set(plain["model"]) == {"weight", "bias"}
    plain["optimizer"]["param_groups"][0]["lr"] = 0.5
    with torch.no_grad():
        plain["model"]["weight"].fill_(4)
    load_state_dicts(state, plain, statefuls)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert (model.weight == 4).all()
    assert state == {"model": model, "optimizer": optimizer}


def test_optimizers_without_state_get_templates_for_the_stored_state() -> None:
    model = torch.nn.Linear(3, 2)
    fresh = torch.optim.AdamW(model.parameters())
    used = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    used.step()
    kind, wide = DType.named("float32"), DType.named("float64")
    stored = [
        (("fresh", "state", 0, "exp_avg"), kind, (2, 3)),
        (("fresh", "state", "1", "exp_avg"), wide, (2,)),
        (("fresh", "state", "1", "step"), kind, ()),
        (("fresh", "state", "1", "rows"), kind, (5,)),
        (("fresh", "state", "1", "note"), None, ()),
        (("fresh", "state", "2", "exp_avg"), kind, (2,)),  # there is no third parameter
        (("fresh", "state", "name", "exp_avg"), kind, (2,)),
        (("fresh", "param_groups", 0, "lr"), None, ()),
        (("used", "state", 0, "other"), kind, (2, 3)),
        (("step",), None, ()),
    ]
    plain, found = call_state_dicts({"fresh": fresh, "used": used, "step": 1})
    before = used.state_dict()["state"]
    materialize_optimizer_state(plain, found, stored)
    assert not fresh.state
    assert {name: list(one) for name, one in plain["used"]["state"].items()} == {
        name: list(one) for name, one in before.items()
    }
    room = plain["fresh"]["state"]
    shapes = {
        (number, name): (one.dtype, tuple(one.shape)) if one is not None else None
        for number, entry in room.items()
        for name, one in entry.items()
    }
    assert shapes == {
        (0, "exp_avg"): (torch.float32, (2, 3)),
        (1, "exp_avg"): (torch.float64, (2,)),
        (1, "step"): (torch.float32, ()),
        (1, "rows"): (torch.float32, (5,)),
        (1, "note"): None,
    }


def test_the_leaves_of_the_checkpoint_are_read_only_if_needed() -> None:
    def never():
        raise AssertionError
        yield

    plain, found = call_state_dicts({"model": torch.nn.Linear(1, 1), "step": 1})
    materialize_optimizer_state(plain, found, never())
    assert set(plain) == {"model", "step"}
    assert set(found) == {"model"}
