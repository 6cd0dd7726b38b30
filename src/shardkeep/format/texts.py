"""Many texts as one run of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardkeep.format.values import Json, decode_key, encode_key
from shardkeep.types import I64

__all__ = ["from_json", "joined", "to_json"]


def joined(texts: Sequence[str], gap: int = 0) -> tuple[bytes, I64]:
    """Return all texts as UTF-8 with `gap` zeros between them, and their lengths."""
    text = ("\0" * gap).join(texts)
    if text.isascii():  # One call of `encode` instead of one for each text.
        return text.encode(), np.fromiter(map(len, texts), np.int64, len(texts))
    parts = [text.encode("utf-8", "surrogatepass") for text in texts]
    return bytes(gap).join(parts), np.fromiter(map(len, parts), np.int64, len(parts))


def to_json(texts: Sequence[str]) -> list[Json]:
    """Return texts for a JSON message; plain JSON would merge two lone surrogates."""
    plain = "".join(texts).isascii()
    return list(texts) if plain else [encode_key(text) for text in texts]


def from_json(texts: Sequence[Json]) -> tuple[str, ...]:
    """Invert `to_json`."""
    return tuple(text if type(text) is str else decode_key(text) for text in texts)
