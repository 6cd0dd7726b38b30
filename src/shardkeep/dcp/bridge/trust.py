"""Which classes objects may be built of, besides those that are known to be safe."""

from __future__ import annotations

import torch

__all__ = ["trusted"]


def trusted() -> tuple[str, ...]:
    """Those that the job trusts `torch.load` with: `torch.serialization.add_safe_globals`."""
    found = []
    for entry in torch.serialization.get_safe_globals():
        # Newer releases take (class, "name in the file") as well.
        given, name = entry if isinstance(entry, tuple) else (entry, None)
        found.append(name or f"{given.__module__}.{given.__qualname__}")
    return tuple(found)
