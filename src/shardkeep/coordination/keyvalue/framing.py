"""Messages as pieces that fit into a key-value store: framed, checksummed, compressed if useful."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import zstandard

from shardkeep.errors import FormatError

__all__ = ["PIECE_BYTES", "join_pieces", "piece_count", "split_into_pieces"]

PIECE_BYTES = 1 << 20
"""Maximum size of a piece. torch's TCPStore (libuv server, 2.13 and 2.15) drops the connection for
good on a value of more than 8 MiB."""

_HEADER = struct.Struct("<4sBQQI")
"""Magic bytes, whether the body is compressed, length of the message, length of the body, and the
CRC-32 of the three fields before it and the body."""
_MAGIC = b"SKm1"
_MIN_COMPRESSED_BYTES = 512
"""Compressing a shorter message costs more time than it saves."""
_MAX_COMPRESSED_RATIO = 0.9
"""A compressed body is used only if it is at most this fraction of the message."""


def split_into_pieces(message: bytes) -> list[bytes]:
    """Return the pieces of a message, in order: at least one, none longer than `PIECE_BYTES`."""
    body, compressed = message, False
    if len(message) >= _MIN_COMPRESSED_BYTES:
        smaller = zstandard.ZstdCompressor(level=1).compress(message)
        if len(smaller) < _MAX_COMPRESSED_RATIO * len(message):
            body, compressed = smaller, True
    crc = _crc(compressed, len(message), body)
    header = _HEADER.pack(_MAGIC, compressed, len(message), len(body), crc)
    framed = memoryview(header + body)
    return [bytes(framed[at : at + PIECE_BYTES]) for at in range(0, len(framed), PIECE_BYTES)]


def piece_count(first: bytes) -> int:
    """Return the number of pieces of a message, given its first piece."""
    _, _, body_length, _ = _header(first)
    return -(-(_HEADER.size + body_length) // PIECE_BYTES)


def join_pieces(pieces: Sequence[bytes]) -> bytes:
    """Return the message that was split into these pieces.

    Raises:
        FormatError: a piece is missing, or a byte differs from what was sent.
    """
    compressed, length, body_length, crc = _header(pieces[0])
    body = b"".join([pieces[0][_HEADER.size :], *pieces[1:]])
    if len(body) != body_length or _crc(compressed, length, body) != crc:
        raise FormatError(
            f"a message between ranks arrived damaged: {len(body)} bytes, expected {body_length}, "
            "or a wrong checksum; check the network to the host of the job's store"
        )
    if not compressed:
        return body
    return zstandard.ZstdDecompressor().decompress(body, max_output_size=length)


def _header(first: bytes) -> tuple[int, int, int, int]:
    if len(first) < _HEADER.size or first[:4] != _MAGIC:
        raise FormatError(
            f"a message between ranks does not start with {_MAGIC!r} but with {first[:8]!r}; do "
            "all ranks run the same version of shardkeep?"
        )
    _, compressed, length, body_length, crc = _HEADER.unpack_from(first)
    return compressed, length, body_length, crc


def _crc(compressed: int, length: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(struct.pack("<BQQ", compressed, length, len(body))))
