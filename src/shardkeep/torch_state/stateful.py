"""Modules, optimizers and other objects with a state of their own, at the top level of a state."""

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
"""Key in the state -> the object at that key that has `state_dict` and `load_state_dict`."""


StoredLeaf = tuple[Path, DType | None, tuple[int, ...]]
"""A leaf of a checkpoint: its path, and dtype and shape of a tensor. An object has no dtype."""


def call_state_dicts(state: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], StatefulObjects]:
    """Return the state with each top-level stateful object replaced by its `state_dict()`.

    An object is stateful if it has both `state_dict` and `load_state_dict`, as in DCP. The keys
    keep their order. Without such an object, the result is the state itself, otherwise a shallow
    copy. The second result are the replaced objects.

    Raises:
        TypeError: the state is not a mapping.
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
    """Add templates for the stored state of optimizers that have not made a step yet.

    The `state_dict` of such an optimizer has no entries for it. Without templates, the optimizer
    would silently continue without its stored state. A value with the shape of its parameter is
    sharded as the parameter is. The optimizers themselves do not change.

    Args:
        plain: the state that `call_state_dicts` returned; it is extended.
        found: the objects that `call_state_dicts` returned.
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
        number = str(path[2])  # An int, or its digits if torch wrote the checkpoint.
        if number.isdecimal() and int(number) < len(known):
            entries = plain[key]["state"].setdefault(int(number), {})
            entries[path[3]] = _template(known[int(number)], dtype, shape)


def _template(param: torch.Tensor, dtype: DType | None, shape: tuple[int, ...]) -> Any:
    if dtype is None:
        return None
    kind: torch.dtype = getattr(torch, dtype.name)
    if shape and shape == tuple(param.shape):
        return torch.zeros_like(param, dtype=kind, requires_grad=False)
    return torch.zeros(shape, dtype=kind)


def load_state_dicts(
    state: MutableMapping[Any, Any], plain: Mapping[Any, Any], found: StatefulObjects
) -> None:
    """Pass each object its loaded state, and put the other loaded values into `state`.

    Args:
        state: the state that `call_state_dicts` was called with.
        plain: the state that it returned, filled by a load.
        found: the objects that it returned.
    """
    for key, value in plain.items():
        if key in found:
            found[key].load_state_dict(value)
        elif plain is not state:
            state[key] = value
