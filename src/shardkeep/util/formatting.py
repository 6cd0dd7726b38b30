"""Numbers as text for people, and back."""

from __future__ import annotations

import re

__all__ = ["count", "human_bytes", "parse_bytes"]

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")

_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGTPE]?)(i?)(B?)\s*", re.IGNORECASE)
_POWERS = {letter: power for power, letter in enumerate(("", "K", "M", "G", "T", "P", "E"))}


def human_bytes(nbytes: int) -> str:
    """Return a number of bytes in about three digits: `999 B`, `1.5 KiB`, `12.0 GiB`."""
    if nbytes < 1024:
        return f"{nbytes} B"
    unit, value = 0, nbytes / 1024
    while value >= 1023.95 and unit < len(_UNITS) - 1:
        unit, value = unit + 1, value / 1024
    return f"{value:.1f} {_UNITS[unit]}"


def parse_bytes(text: str) -> int:
    """Return the number of bytes that a text names: `65536`, `64KiB`, `1.5 GB`, `64M`.

    Units with an "i" are powers of 1024 and units with "B" alone are powers of 1000, in upper or
    lower case. A letter without either (`64M`) is a power of 1024, as in most tools.

    Raises:
        ValueError: the text is not a size, or not a whole number of bytes.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not a number of bytes")
    number, letter, binary, byte = found.groups()
    if binary and not letter:
        raise ValueError(f"{text!r} is not a number of bytes")
    base = 1000 if byte and not binary else 1024
    value = float(number) * base ** _POWERS[letter.upper()]
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(value)


def count(number: int, thing: str) -> str:
    """Return a number of things: `1 tensor`, `2,000 tensors`."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")
