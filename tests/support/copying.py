"""A state with every kind of value that can change during a save, and changes of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from shardkeep.stores import LocalStore
from support.scenarios import values


class Cursor:
    """An object with a state dict of its own, as data loaders have."""

    def __init__(self) -> None:
        self.at, self.order = 3, [5, 4]


def changeable() -> dict[str, Any]:
    base = values("base", (40, 30), torch.float32)
    return {
        "contiguous": values("c", (300, 200), torch.float32),
        "view": base[3:20, 5:25],
        "same memory": base,
        "transposed": values("t", (64, 48), torch.bfloat16).t(),
        "scalar": values("s", (), torch.float64),
        "many": [values(f"m{n}", (4,), torch.int64) for n in range(50)],
        "parameter": torch.nn.Parameter(values("p", (9, 3), torch.float32)),
        "arrays": {"a": np.arange(1000.0), "b": np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::2]},
        "nested": {"list": [[1, [2, 3]], {"x": [4]}], "bytes": bytearray(b"abc"), "set": {1, 2}},
        "object": Cursor(),
        "number": 7,
    }


def change(state: dict[str, Any]) -> None:
    """Change every leaf, in place if possible."""
    for tensor in _tensors(state):
        tensor.detach().add_(1)
    for array in state["arrays"].values():
        np.add(array, 1, out=array)
    state["nested"]["list"][0][1].append(9)
    state["nested"]["list"][1]["x"].clear()
    state["nested"]["list"].append("more")
    state["nested"]["bytes"][0] = 0
    state["nested"]["set"].add(3)
    state["object"].at = 4
    state["object"].order.append(6)
    state["many"].clear()
    state["arrays"].clear()
    state["number"] = 8
    del state["contiguous"]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


@contextmanager
def gate() -> Iterator[Event]:
    """Yield an event, and create no data file before it is set."""
    opened, open_writer = Event(), LocalStore.open_positioned_writer

    def waiting(store: LocalStore, name: str, nbytes: int) -> Any:
        assert opened.wait(60)
        return open_writer(store, name, nbytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "open_positioned_writer", waiting)
        try:
            yield opened
        finally:
            opened.set()
