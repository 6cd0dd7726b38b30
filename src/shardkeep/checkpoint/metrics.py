"""Metrics of a step, stored in the manifest's header so that they are committed with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, SupportsFloat

__all__ = ["HEADER", "finite", "metrics_in"]

HEADER = "metrics"
"""Key of the metrics in the manifest's header."""

_MAX_METRICS = 10_000
"""Maximum number of metrics of a step, far more than a job measures."""


def finite(metrics: Mapping[str, SupportsFloat]) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return the finite metrics as floats, and the names of the others.

    Raises:
        TypeError: a name is not a string, or a value is not a number.
        ValueError: there are more metrics than a checkpoint may have.
    """
    if len(metrics) > _MAX_METRICS:
        raise ValueError(f"a step may have at most {_MAX_METRICS} metrics, not {len(metrics)}")
    found, not_finite = {}, []
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise TypeError(f"the name of a metric must be a str, not {name!r}")
        number = _number(value)
        if number is None:
            raise TypeError(f"metric {name!r} must be a number, not a {type(value).__name__}")
        if math.isfinite(number):
            found[name] = number
        else:
            not_finite.append(name)
    return found, tuple(not_finite)


def metrics_in(header: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics in a manifest's header, without entries that are not finite numbers."""
    entries = header.get(HEADER)
    if not isinstance(entries, Mapping) or len(entries) > _MAX_METRICS:
        return {}
    found = {}
    for name, value in entries.items():
        number = _number(value) if type(value) in (int, float) else None
        if isinstance(name, str) and number is not None and math.isfinite(number):
            found[name] = number
    return found


def _number(value: Any) -> float | None:
    """Return a value as a float, infinite if it is too large; None if it is not a number."""
    if isinstance(value, str | bytes) or not hasattr(type(value), "__float__"):
        return None
    try:
        # torch warns without the detach
        return float(value.detach() if hasattr(value, "detach") else value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):  # arrays of several numbers
        return None
