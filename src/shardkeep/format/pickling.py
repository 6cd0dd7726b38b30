"""An emitter of pickles, opcode by opcode: no object is pickled, so nothing needs to be imported.

A pickle here is a table of constants, each memoised and popped off the stack, and then a body that
only refers to them. References can be used in any order, and equal values are written once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

__all__ = ["FALSE", "NONE", "Pickle", "integer", "mapping", "new", "sequence", "strings"]

NONE = b"N"
FALSE = b"\x89"
_PROTOCOL = b"\x80\x04"
_TUPLES = (b")", b"\x85", b"\x86", b"\x87")


def integer(value: int) -> bytes:
    """Push an int of any size."""
    if 0 <= value < 256:
        return b"K%c" % value
    if 0 <= value < 65536:
        return b"M" + value.to_bytes(2, "little")
    if -(2**31) <= value < 2**31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a%c%b" % (len(data), data)


def sequence(parts: Sequence[bytes]) -> bytes:
    """Push a tuple of what the parts push."""
    if len(parts) < len(_TUPLES):
        return b"".join(parts) + _TUPLES[len(parts)]
    return b"(%bt" % b"".join(parts)


def mapping(parts: Iterable[bytes]) -> bytes:
    """Push a dict of what the parts push: key, value, key, value, ..."""
    return b"}(%bu" % b"".join(parts)


def new(kind: bytes, state: bytes) -> bytes:
    """Push an instance of a class, made without arguments and filled with `state`."""
    return b"%b)\x81%bb" % (kind, state)


def strings(value: str) -> bytes:
    """Push a str. Lone surrogates pass, as in Python's own pickles."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X%b%b" % (len(data).to_bytes(4, "little"), data)


class Pickle:
    """One pickle in the making (protocol 4, in one frame)."""

    def __init__(self) -> None:
        self._constants: list[bytes] = []
        self._texts: dict[str, bytes] = {}

    def constant(self, pushes: bytes) -> bytes:
        """Put what `pushes` pushes into the table; the answer pushes it again."""
        number = len(self._constants)
        self._constants.append(pushes + b"\x940")
        return b"h%c" % number if number < 256 else b"j" + number.to_bytes(4, "little")

    def text(self, value: str) -> bytes:
        """Push a str from the table."""
        known = self._texts.get(value)
        if known is None:
            known = self._texts[value] = self.constant(strings(value))
        return known

    def named(self, module: str, name: str) -> bytes:
        """Push a global from the table."""
        return self.constant(strings(module) + strings(name) + b"\x93")

    def finish(self, body: bytes) -> bytes:
        """The pickle of what `body` pushes."""
        content = b"".join((*self._constants, body, b"."))
        return _PROTOCOL + b"\x95" + struct.pack("<Q", len(content)) + content
