"""Modules, optimizers and the like, put into a state as they are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch

from shardkeep.state.markers import has_state
from shardkeep.types import DType, Path

__all__ = [
    "StatefulObjects",
    "StoredLeaf",
    "call_state_dicts",
    "load_state_dicts",
    "materialize_optimizer_state",
]

StatefulObjects = dict[Any, Any]
"""Key in the state -> the object with `state_dict` and `load_state_dict` that is there."""


StoredLeaf = tuple[Path, DType | None, tuple[int, ...]]
"""What a checkpoint has at a path: dtype and shape of a tensor; no dtype for an object."""


def call_state_dicts(state: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], StatefulObjects]:
    """The state with each top-level object that has a state replaced by its `state_dict()`.

    An object has one if it has both `state_dict` and `load_state_dict`, as in DCP. The order of the
    keys stays. Without such an object, this is the state itself; else a shallow copy.

    Raises:
        TypeError: it is no mapping.
    """
    if not callable(getattr(state, "items", None)):
        kind = type(state).__name__
        raise TypeError(f"a state is a mapping of names to values, not a {kind}")
    statefuls = {key: value for key, value in state.items() if has_state(value)}
    if not statefuls:
        return state, {}
    made = OrderedDict if isinstance(state, OrderedDict) else dict
    plain = made(
        (key, value.state_dict() if key in statefuls else value) for key, value in state.items()
    )
    return plain, statefuls


def materialize_optimizer_state(
    plain: Mapping[Any, Any], found: StatefulObjects, stored: Iterable[StoredLeaf]
) -> None:
    """Give optimizers that never made a step a template of the state that a checkpoint has.

    Their own `state_dict` has no place for it: they would go on without it, and nobody would know.
    What has the shape of its parameter is laid out over the ranks as the parameter is. The
    optimizers themselves are not touched.

    Args:
        plain, found: what `call_state_dicts` returned; `plain` is extended.
        stored: all leaves of the checkpoint; read only if there is such an optimizer.
    """
    params = {
        str(key): (key, [param for group in one.param_groups for param in group["params"]])
        for key, one in found.items()
        if isinstance(one, torch.optim.Optimizer) and not one.state
    }
    for path, dtype, shape in stored if params else ():
        if len(path) != 4 or path[1] != "state" or str(path[0]) not in params:
            continue
        key, known = params[str(path[0])]
        number = str(path[2])  # an int, or its digits where torch wrote the checkpoint
        if number.isdecimal() and int(number) < len(known):
            room = plain[key]["state"].setdefault(int(number), {})
            room[path[3]] = _room(known[int(number)], dtype, shape)


def _room(param: torch.Tensor, dtype: DType | None, shape: tuple[int, ...]) -> Any:
    if dtype is None:
        return None
    kind: torch.dtype = getattr(torch, dtype.name)
    if shape and shape == tuple(param.shape):
        return torch.zeros_like(param, dtype=kind, requires_grad=False)
    return torch.zeros(shape, dtype=kind)


def load_state_dicts(
    state: MutableMapping[Any, Any], plain: Mapping[Any, Any], found: StatefulObjects
) -> None:
    """After a load: give each object its state, and put the other values back into `state`.

    Args:
        state: what `call_state_dicts` was called with.
        plain, found: what it returned; `plain` is filled.
    """
    for key, value in plain.items():
        if key in found:
            found[key].load_state_dict(value)
        elif plain is not state:
            state[key] = value
