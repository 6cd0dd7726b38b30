"""Digests of the content of a state, by which ranks compare values that must be equal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np

from shardkeep.format import values
from shardkeep.torch_state.columns import PieceColumns
from shardkeep.torch_state.objects import to_bytes
from shardkeep.torch_state.payloads import StatePayloads
from shardkeep.types import DTYPES, Box, Path, Structure, Tensors

__all__ = ["content_digests"]

_BLOCK_BYTES = 1 << 20
"""Bytes of a tensor that are copied and hashed at a time."""


def content_digests(
    paths: frozenset[Path],
    structure: Structure,
    tensors: Tensors,
    pieces: PieceColumns,
    objects: Mapping[str, Any],
) -> dict[str, bytes]:
    """Return a digest of each object, and of each piece of a tensor, at or below these paths.

    Returns:
        Description of the object or piece, as it appears in errors -> 16 bytes.
    """
    if not paths:
        return {}
    wanted = {
        name
        for name, path in structure.leaves.items()
        if any(path[:depth] in paths for depth in range(1, len(path) + 1))
    }
    found = {
        f"object {name!r}": _object_digest(name, objects[name]) for name in wanted & set(objects)
    }
    mine = [row for row, t in enumerate(pieces.piece.tolist()) if tensors.names[t] in wanted]
    payloads = StatePayloads([pieces.memory[row] for row in mine], pieces.addresses[mine])
    space = np.empty(_BLOCK_BYTES, dtype=np.uint8)
    for k, row in enumerate(mine):
        tensor = int(pieces.piece[row])
        ndim, dtype = int(tensors.ndim[tensor]), DTYPES[tensors.dtype[tensor]]
        sizes = tuple(pieces.sizes[row, :ndim].tolist())
        box = Box(tuple(pieces.offsets[row, :ndim].tolist()), sizes)
        whole = box.sizes == tuple(tensors.shape[tensor, :ndim].tolist())
        hashed, nbytes = blake2b(digest_size=16), box.numel * dtype.itemsize
        for start in range(0, nbytes, _BLOCK_BYTES):
            count = min(_BLOCK_BYTES, nbytes - start)
            payloads.copy(k, start, count, space.ctypes.data)
            hashed.update(space.data[:count])
        what = f"tensor {tensors.names[tensor]!r}" + ("" if whole else f" at {box}")
        found[what] = hashed.digest()
    return found


def _object_digest(name: str, value: Any) -> bytes:
    """Return a digest of the value if it can be encoded exactly, otherwise of its pickle."""
    try:
        return values.digest(values.encode(value, limit=sys.maxsize))
    except values.NotEncodable:
        return blake2b(to_bytes(value, name=name), digest_size=16).digest()
