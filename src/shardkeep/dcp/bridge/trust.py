"""The classes that a job trusts, besides those that are safe anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["how_to_trust", "trusted"]


def trusted() -> tuple[str, ...]:
    """Return the classes that the job has passed to `torch.serialization.add_safe_globals`.

    In releases without that function, none are trusted.
    """
    entries: Callable[[], Any] = getattr(torch.serialization, "get_safe_globals", list)
    found = []
    for entry in entries():
        # Newer releases take (class, "name in the file") as well.
        given, name = entry if isinstance(entry, tuple) else (entry, None)
        found.append(name or f"{given.__module__}.{given.__qualname__}")
    return tuple(found)


def how_to_trust(classes: Sequence[str]) -> str:
    """Return the call that trusts these classes, for an error message."""
    return f"call torch.serialization.add_safe_globals([{', '.join(classes)}])"
