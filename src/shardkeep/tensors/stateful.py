"""Modules, optimizers and the like, put into a state as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Statefuls", "expand", "restore"]

Statefuls = dict[Any, Any]
"""Key in the state -> the object with `state_dict` and `load_state_dict` that is there."""


def expand(state: Mapping[Any, Any]) -> tuple[dict[Any, Any], Statefuls]:
    """The state with each top-level object that has a state replaced by its `state_dict()`.

    An object has one if it has both `state_dict` and `load_state_dict`, as in DCP. The order of the
    keys stays. Nothing else is copied.
    """
    statefuls = {key: value for key, value in state.items() if _has_state(value)}
    plain = {
        key: value.state_dict() if key in statefuls else value for key, value in state.items()
    }
    return plain, statefuls


def restore(plain: Mapping[Any, Any], statefuls: Statefuls) -> None:
    """Give each object its loaded state: `plain` is what `expand` returned, filled."""
    for key, value in statefuls.items():
        value.load_state_dict(plain[key])


def _has_state(value: Any) -> bool:
    return all(
        callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict")
    )
