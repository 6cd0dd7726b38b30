"""Numbers as people read them."""

from __future__ import annotations

__all__ = ["count", "human_bytes"]

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def human_bytes(nbytes: int) -> str:
    """A number of bytes in three digits or so: `999 B`, `1.5 KiB`, `12.0 GiB`."""
    if nbytes < 1024:
        return f"{nbytes} B"
    unit, value = 0, nbytes / 1024
    while value >= 1023.95 and unit < len(_UNITS) - 1:
        unit, value = unit + 1, value / 1024
    return f"{value:.1f} {_UNITS[unit]}"


def count(number: int, thing: str) -> str:
    """A number of things: `1 tensor`, `2,000 tensors`."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")
