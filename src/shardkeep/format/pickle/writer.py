"""A writer of pickles, opcode by opcode: it pickles no object, so it needs to import nothing.

A pickle here is a table of constants, each memoised and popped from the stack, followed by a body
that only refers to them. References can be used in any order, and equal values are written once.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from shardkeep.format.texts import joined
from shardkeep.types import I64

__all__ = [
    "FALSE",
    "NONE",
    "Pickle",
    "integer",
    "new",
    "reference",
    "sequence",
    "strings",
]

NONE = b"N"
FALSE = b"\x89"
_KEPT = b"\x940"
"""Follows the opcodes that push a constant: memoise it and pop it from the stack."""
_PROTOCOL = b"\x80\x04"
_TUPLES = (b")", b"\x85", b"\x86", b"\x87")


def integer(value: int) -> bytes:
    """Return the opcode that pushes an int of any size."""
    if 0 <= value < 256:
        return b"K%c" % value
    if 0 <= value < 65536:
        return b"M" + value.to_bytes(2, "little")
    if -(2**31) <= value < 2**31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a%c%b" % (len(data), data)


def sequence(parts: Sequence[bytes]) -> bytes:
    """Return the opcodes that push a tuple of these parts."""
    if len(parts) < len(_TUPLES):
        return b"".join(parts) + _TUPLES[len(parts)]
    return b"(%bt" % b"".join(parts)


def new(kind: bytes, state: bytes) -> bytes:
    """Return the opcodes that push an instance of a class filled with `state`."""
    return b"%b)\x81%bb" % (kind, state)


def strings(value: str) -> bytes:
    """Return the opcode that pushes a str. Lone surrogates are kept, as in Python's own pickles."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X%b%b" % (len(data).to_bytes(4, "little"), data)


def reference(number: int) -> bytes:
    """Return the opcode that pushes the constant with this number."""
    return b"h%c" % number if number < 256 else b"j" + number.to_bytes(4, "little")


class Pickle:
    """One pickle under construction (protocol 4, in one frame). Constants are numbered from 0."""

    def __init__(self) -> None:
        self._constants: list[bytes] = []
        self._count = 0
        self._texts: dict[str, int] = {}

    def constant(self, pushes: bytes) -> int:
        """Add what `pushes` pushes to the table, and return its number."""
        self._constants.append(pushes + _KEPT)
        self._count += 1
        return self._count - 1

    def text(self, value: str) -> int:
        """Return the number of a str."""
        known = self._texts.get(value)
        if known is None:
            known = self._texts[value] = self.constant(strings(value))
        return known

    def texts(self, values: Sequence[str]) -> I64:
        """Return the numbers of many new strings, without looking each one up."""
        if not values:
            return np.empty(0, np.int64)
        data, lengths = joined(values, gap=len(_KEPT) + 5)
        content = np.frombuffer(bytes(5) + data + _KEPT, np.uint8).copy()
        starts = np.cumsum(lengths + len(_KEPT) + 5) - lengths - len(_KEPT)
        content[starts - 5] = ord("X")
        for byte in range(4):
            content[starts - 4 + byte] = lengths >> (8 * byte) & 0xFF
        for byte, value in enumerate(_KEPT):
            content[starts + lengths + byte] = value
        self._constants.append(content.tobytes())
        self._count += len(values)
        return np.arange(self._count - len(values), self._count)

    def named(self, module: str, name: str) -> int:
        """Return the number of a global."""
        return self.constant(strings(module) + strings(name) + b"\x93")

    def finish(self, *body: bytes) -> bytes:
        """Return the pickle of everything that `body` pushes."""
        content = (*self._constants, *body, b".")
        frame = struct.pack("<Q", sum(map(len, content)))
        return b"".join((_PROTOCOL, b"\x95", frame, *content))
