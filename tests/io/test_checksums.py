"""CRC-32 with and without the fast library."""

from __future__ import annotations

import zlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardkeep.io.checksums as module
from shardkeep.io.checksums import block_checksums, checksum_payload, crc32, whole_crc
from shardkeep.settings import BLOCK


@pytest.fixture(params=["deflate", "isal.isal_zlib", "zlib"])
def library(request, monkeypatch):
    if request.param == "deflate":
        assert module._at is not None
        return
    monkeypatch.setattr(module, "_zlib", pytest.importorskip(request.param))
    monkeypatch.setattr(module, "_at", None)
    if request.param == "zlib":
        monkeypatch.setattr(module, "combine", module._combined)


def random_bytes(n):
    return np.random.default_rng(n).bytes(n)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("n", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 5 * BLOCK + 77])
def test_block_checksums_combine_to_that_of_the_whole(n):
    data = random_bytes(n)
    blocks, whole = checksum_payload(data)
    assert blocks.dtype == np.uint32
    assert blocks.tolist() == [zlib.crc32(data[i : i + BLOCK]) for i in range(0, n, BLOCK)]
    assert whole == zlib.crc32(data) == whole_crc(blocks, n) == whole_crc(blocks.tolist(), n)
    assert (block_checksums(bytearray(data)) == blocks).all()
    array = np.frombuffer(data, dtype=np.uint8)
    assert module.crc32_at(array.ctypes.data, array.data) == whole
    assert module.crc32_blocks(array.ctypes.data, n) == blocks.tolist()
    assert (block_checksums(memoryview(data)) == blocks).all()


@pytest.mark.usefixtures("library")
@given(st.binary(max_size=200), st.binary(max_size=200), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_continued_and_combined_checksums_are_equal(a, b, value):
    assert crc32(a + b) == crc32(b, crc32(a)) == module.combine(crc32(a), crc32(b), len(b))
    assert crc32(a, value) == zlib.crc32(a, value)


def test_combining_long_runs_agrees_with_the_fast_library():
    fast = pytest.importorskip("isal.isal_zlib").crc32_combine
    for n in (1, 7, BLOCK, 2**31 + 5, 2**40 + 1):
        assert module._multiply(module._shift(n), 0x12345678) ^ 0x9ABCDEF0 == fast(
            0x12345678, 0x9ABCDEF0, n
        )


def test_the_checksum_of_an_array_is_that_of_its_bytes():
    array = np.arange(12, dtype=np.float32).astype(ml_dtypes.bfloat16)
    assert crc32(array.view(np.uint8)) == zlib.crc32(array.tobytes())
    assert checksum_payload(array.view(np.uint8))[1] == zlib.crc32(array.tobytes())
