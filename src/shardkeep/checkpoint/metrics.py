"""Metrics of a step. They are part of the commit, in the manifest's header: no file to go stale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, SupportsFloat

__all__ = ["HEADER", "finite", "metrics_in"]

HEADER = "metrics"
"""What the manifest's header calls them."""

_MOST = 10_000
"""Metrics of a step at most: more than that is no list of measured values."""


def finite(metrics: Mapping[str, SupportsFloat]) -> tuple[dict[str, float], tuple[str, ...]]:
    """What can be saved of metrics: numbers by name, and the names of those that are not finite.

    Raises:
        TypeError: a name is no text, or a value no number.
        ValueError: there are more than any list of measured values has.
    """
    if len(metrics) > _MOST:
        raise ValueError(f"{len(metrics)} metrics of one step: {_MOST} at most")
    found, left = {}, []
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise TypeError(f"the name of a metric is a text, not {name!r}")
        number = _number(value)
        if number is None:
            raise TypeError(f"metric {name!r} is a {type(value).__name__}, which is no number")
        if math.isfinite(number):
            found[name] = number
        else:
            left.append(name)
    return found, tuple(left)


def metrics_in(header: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that a manifest's header holds; what is no finite number is not one."""
    told = header.get(HEADER)
    if not isinstance(told, Mapping) or len(told) > _MOST:
        return {}
    found = {}
    for name, value in told.items():
        number = _number(value) if type(value) in (int, float) else None
        if isinstance(name, str) and number is not None and math.isfinite(number):
            found[name] = number
    return found


def _number(value: Any) -> float | None:
    """A number as a float, infinite if it is too large for one; None if it is none."""
    if isinstance(value, str | bytes) or not hasattr(type(value), "__float__"):
        return None
    try:
        return float(value.detach() if hasattr(value, "detach") else value)  # torch warns otherwise
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):  # arrays of several numbers
        return None
