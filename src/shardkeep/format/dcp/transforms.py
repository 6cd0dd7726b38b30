"""Undoes stream transforms: what DCP's extensions did to the bytes of an item."""

from __future__ import annotations

import zstandard

from shardkeep.errors import FormatError
from shardkeep.format.excerpt import shown

__all__ = ["undo"]

_STEP = 1 << 20


def undo(data: bytes, transforms: tuple[str, ...], *, limit: int, file: str, place: str) -> bytes:
    """Return the bytes of an item as they were before its transforms.

    Args:
        data: the stored bytes.
        transforms: as the metadata names them, outermost last.
        limit: maximum bytes that each transform may produce.
        file, place: name the item in errors.

    Raises:
        FormatError: an unknown transform, an invalid stream, or more than `limit` bytes.
    """
    for name in reversed(transforms):
        if (
            name.partition("/")[0] != "stream.zstd"
            or name.partition("/")[2].partition(".")[0] != "1"
        ):
            raise FormatError(f"unknown stream transform {shown(name)}", file=file, place=place)
        data = _zstd(data, limit, file, place)
    return data


def _zstd(data: bytes, limit: int, file: str, place: str) -> bytes:
    """Decompress in steps: a stream of 20 KB can produce a terabyte."""
    pieces = []
    room = limit
    try:
        with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as stream:
            while piece := stream.read(min(_STEP, room + 1)):
                room -= len(piece)
                if room < 0:
                    what = f"it decompresses to more than {limit} bytes"
                    raise FormatError(what, file=file, place=place)
                pieces.append(piece)
    except zstandard.ZstdError as error:
        raise FormatError(f"invalid zstd stream: {error}", file=file, place=place) from error
    return b"".join(pieces)
