"""Stream transforms are undone within a limit."""

from __future__ import annotations

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from shardkeep.errors import FormatError
from shardkeep.format.dcp.transforms import undo

WHERE = {"file": "__0_0.distcp", "place": "w"}
ZSTD = "stream.zstd/1"


def packed(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


@given(st.binary(max_size=5000))
def test_zstd_is_decompressed(data: bytes) -> None:
    assert undo(packed(data), (ZSTD,), limit=len(data), **WHERE) == data
    assert undo(packed(packed(data)), (ZSTD, ZSTD), limit=6000, **WHERE) == data
    assert undo(data, (), limit=0, **WHERE) == data


def test_several_frames_are_decompressed() -> None:
    assert undo(packed(b"a") + packed(b"b"), (ZSTD,), limit=2, **WHERE) == b"ab"


def test_output_beyond_the_limit_is_refused() -> None:
    assert len(undo(packed(bytes(1000)), (ZSTD,), limit=1000, **WHERE)) == 1000
    with pytest.raises(
        FormatError, match=r"__0_0\.distcp, w: it decompresses to more than 999 bytes"
    ):
        undo(packed(bytes(1000)), (ZSTD,), limit=999, **WHERE)


@pytest.mark.parametrize("name", ["stream.rot13/1", "stream.zstd/2", "stream.zstd", ""])
def test_unknown_transforms_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match=f"unknown stream transform '{name}'"):
        undo(b"", (name,), limit=1, **WHERE)


def test_invalid_streams_are_refused() -> None:
    with pytest.raises(FormatError, match="invalid zstd stream"):
        undo(b"nothing of the kind", (ZSTD,), limit=1000, **WHERE)
