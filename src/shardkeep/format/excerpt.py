"""Excerpts of hostile values for error messages, cut short before they are made."""

from __future__ import annotations

from typing import Any

__all__ = ["shown"]

_ITEMS = 8
_LETTERS = 200


def shown(value: Any) -> str:
    """Return a value as text of bounded length, in bounded time.

    Plain `repr` of a tuple of two of the tuple before it, sixty levels deep, never ends.
    """
    kind = type(value)
    if kind is str or kind is bytes:
        return repr(value) if len(value) <= _LETTERS else f"{value[:_LETTERS]!r}..."
    if kind is int and value.bit_length() > 128:
        return f"<an int of {value.bit_length()} bits>"
    if kind in (int, float, bool, type(None)):
        return repr(value)
    if kind is tuple or kind is list:
        parts = [_flat(part) for part in value[:_ITEMS]] + ["..."] * (len(value) > _ITEMS)
        text = ", ".join(parts) + "," * (kind is tuple and len(value) == 1)
        return f"({text})" if kind is tuple else f"[{text}]"
    return f"<{kind.__name__}>"


def _flat(value: Any) -> str:
    return f"<{type(value).__name__}>" if type(value) in (tuple, list) else shown(value)
