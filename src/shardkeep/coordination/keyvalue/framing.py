"""A message as pieces that a key-value store takes: framed, checksummed, compressed if it pays."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import zstandard

from shardkeep.errors import FormatError

__all__ = ["PIECE", "count", "join", "split"]

PIECE = 1 << 20
"""Bytes of a piece at most. torch's TCPStore (libuv server, 2.13 and 2.15) drops the connection for
good on a value of more than 8 MiB."""

_HEADER = struct.Struct("<4sBQQI")
"""Magic, whether compressed, bytes of the message, bytes of the body, CRC-32 of all that follows
the magic but itself."""
_MAGIC = b"SKm1"
_WORTH = 512
"""Shorter messages are not worth the compressor's set-up."""


def split(message: bytes) -> list[bytes]:
    """The pieces of a message, in order: at least one, each of `PIECE` bytes at most."""
    body, packed = message, False
    if len(message) >= _WORTH:
        small = zstandard.ZstdCompressor(level=1).compress(message)
        if len(small) < 0.9 * len(message):
            body, packed = small, True
    crc = _crc(packed, len(message), body)
    whole = memoryview(_HEADER.pack(_MAGIC, packed, len(message), len(body), crc) + body)
    return [bytes(whole[at : at + PIECE]) for at in range(0, len(whole), PIECE)]


def count(first: bytes) -> int:
    """How many pieces the message has that begins with this one."""
    return -(-(_HEADER.size + _header(first)[2]) // PIECE)


def join(pieces: Sequence[bytes]) -> bytes:
    """The message; FormatError if a byte of it is not what was sent."""
    packed, size, length, crc = _header(pieces[0])
    body = b"".join([pieces[0][_HEADER.size :], *pieces[1:]])
    if len(body) != length or _crc(packed, size, body) != crc:
        raise FormatError(f"a message of {length} bytes arrived damaged")
    if not packed:
        return body
    return zstandard.ZstdDecompressor().decompress(body, max_output_size=size)


def _header(first: bytes) -> tuple[int, int, int, int]:
    if len(first) < _HEADER.size or first[:4] != _MAGIC:
        raise FormatError(f"not the start of a message: {first[:8]!r}")
    _, packed, size, length, crc = _HEADER.unpack_from(first)
    return packed, size, length, crc


def _crc(packed: int, size: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(struct.pack("<BQQ", packed, size, len(body))))
