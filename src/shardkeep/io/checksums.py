"""CRC-32 of blocks and of whole payloads, and the latter computed from the former."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.io.arena import memory_at
from shardkeep.settings import BLOCK

_zlib: Any
try:
    _zlib = import_module("isal.isal_zlib")  # several times as fast
except ImportError:
    _zlib = import_module("zlib")


def _libdeflate() -> Any:
    """Return libdeflate's `crc32` as a ctypes function; None if it is not installed.

    It is twice as fast as ISA-L's for bytes that are in the cache, on processors without AVX-512
    (docs/decisions, "CRC-32"). It is called through ctypes because the Python wrapper of libdeflate
    does not release the interpreter lock.
    """
    try:
        found = ctypes.CDLL(import_module("deflate._deflate").__file__).libdeflate_crc32
    except (ImportError, OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t)
    found.restype = ctypes.c_uint32
    return found


_at = _libdeflate()
_MIN_FAST_BYTES = 32 * 1024
"""Size from which the faster function makes up for its more expensive call."""

_MIN_FAST_LOOKUP_BYTES = 128 * 1024
"""Size from which the faster function makes up for finding the address, too."""

__all__ = [
    "block_checksums",
    "checksum_payload",
    "combine",
    "crc32",
    "crc32_at",
    "crc32_blocks",
    "crc32_each",
    "whole_crc",
]

Bytes = bytes | bytearray | memoryview | NDArray[Any]

_POLYNOMIAL = 0xEDB88320


def crc32(data: Bytes, value: int = 0) -> int:
    """Return the CRC-32 of contiguous bytes (that of zip and zlib), continued from `value`."""
    found: int  # no casts: called for every small tensor
    if _at is not None and len(data) >= _MIN_FAST_LOOKUP_BYTES:
        plain = np.frombuffer(data, dtype=np.uint8)
        found = _at(value, plain.ctypes.data, plain.nbytes)
    else:
        found = _zlib.crc32(data, value)
    return found


def crc32_at(address: int, data: memoryview, value: int = 0) -> int:
    """Return the CRC-32 of bytes at a known address, continued from `value`."""
    worth = _at is not None and len(data) >= _MIN_FAST_BYTES
    found: int = _at(value, address, len(data)) if worth else _zlib.crc32(data, value)
    return found


def crc32_blocks(address: int, nbytes: int) -> list[int]:
    """Return the CRC-32 of each block of `BLOCK` bytes of memory; the last one may be shorter."""
    sizes = [min(BLOCK, nbytes - at) for at in range(0, nbytes, BLOCK)]
    if _at is None:
        parts = enumerate(sizes)
        return [_zlib.crc32(memory_at(address + at * BLOCK, size)) for at, size in parts]
    return [_at(0, address + at * BLOCK, size) for at, size in enumerate(sizes)]


def crc32_each(small: Sequence[bytes | memoryview]) -> list[int]:
    """Return the CRC-32 of each of many small buffers."""
    tiny = max(map(len, small), default=0) < _MIN_FAST_LOOKUP_BYTES
    return list(map(_zlib.crc32 if tiny else crc32, small))


def checksum_payload(data: Bytes) -> tuple[NDArray[np.uint32], int]:
    """Return the CRC-32 of each block and of all bytes, in one pass over contiguous bytes."""
    array = np.frombuffer(data, dtype=np.uint8)
    blocks = [crc32(array[at : at + BLOCK]) for at in range(0, len(array), BLOCK)]
    return np.array(blocks, dtype=np.uint32), whole_crc(blocks, len(array))


def block_checksums(data: Bytes) -> NDArray[np.uint32]:
    """Return the CRC-32 of each block; the last one may be shorter. Without bytes, it is empty."""
    return checksum_payload(data)[0]


def whole_crc(checksums: Sequence[int] | NDArray[np.uint32], nbytes: int) -> int:
    """Return the CRC-32 of a payload of `nbytes` bytes from those of its blocks."""
    if not len(checksums):
        return 0
    *full, last = checksums.tolist() if isinstance(checksums, np.ndarray) else checksums
    crc = 0
    for block in full:
        crc = combine(crc, block, BLOCK)
    return combine(crc, last, nbytes - len(full) * BLOCK)


def _combined(first: int, second: int, length: int) -> int:
    return _multiply(_shift(length), first) ^ second


combine: Callable[[int, int, int], int] = getattr(_zlib, "crc32_combine", _combined)
"""Return the CRC-32 of two adjacent ranges from theirs and the length of the second one."""


@lru_cache(maxsize=4096)
def _shift(nbytes: int) -> int:
    """Return x ** (8 * nbytes), by which appending `nbytes` zero bytes multiplies a CRC."""
    power, square, result = nbytes * 8, 1 << 30, 1 << 31
    while power:
        if power & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        power >>= 1
    return result


def _multiply(a: int, b: int) -> int:
    """Return the product of two polynomials over GF(2), modulo that of the CRC.

    Bit 31 is the constant term.
    """
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product
