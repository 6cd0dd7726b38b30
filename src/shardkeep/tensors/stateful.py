"""Modules, optimizers and the like, put into a state as they are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from typing import Any

__all__ = ["Statefuls", "expand", "restore"]

Statefuls = dict[Any, Any]
"""Key in the state -> the object with `state_dict` and `load_state_dict` that is there."""


def expand(state: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], Statefuls]:
    """The state with each top-level object that has a state replaced by its `state_dict()`.

    An object has one if it has both `state_dict` and `load_state_dict`, as in DCP. The order of the
    keys stays. Without such an object, this is the state itself; else a shallow copy.
    """
    statefuls = {key: value for key, value in state.items() if _has_state(value)}
    if not statefuls:
        return state, {}
    kind = OrderedDict if isinstance(state, OrderedDict) else dict
    plain = kind(
        (key, value.state_dict() if key in statefuls else value) for key, value in state.items()
    )
    return plain, statefuls


def restore(state: MutableMapping[Any, Any], plain: Mapping[Any, Any], found: Statefuls) -> None:
    """After a load: give each object its state, and put the other values back into `state`.

    Args:
        state: what `expand` was called with.
        plain, found: what it returned; `plain` is filled.
    """
    for key, value in plain.items():
        if key in found:
            found[key].load_state_dict(value)
        elif plain is not state:
            state[key] = value


def _has_state(value: Any) -> bool:
    return all(callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict"))
