"""Which classes objects may be built of, besides those that are known to be safe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["how_to_trust", "trusted"]


def trusted() -> tuple[str, ...]:
    """Those that the job trusts `torch.load` with: `torch.serialization.add_safe_globals`.

    None, in a release that does not have this.
    """
    entries: Callable[[], Any] = getattr(torch.serialization, "get_safe_globals", list)
    found = []
    for entry in entries():
        # Newer releases take (class, "name in the file") as well.
        given, name = entry if isinstance(entry, tuple) else (entry, None)
        found.append(name or f"{given.__module__}.{given.__qualname__}")
    return tuple(found)


def how_to_trust(classes: Sequence[str]) -> str:
    """What to do to trust these classes, given by their full names."""
    return f"call torch.serialization.add_safe_globals([{', '.join(classes)}])"
