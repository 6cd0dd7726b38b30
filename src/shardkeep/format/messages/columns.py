"""Columns as bytes: how ranks send claims and reports to each other. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.errors import FormatError

__all__ = ["pack", "unpack"]

_COUNT = 8
"""Bytes of the head's length field; columns start at multiples of it."""

_DTYPES = {np.dtype(code).str for code in "bBhHiIqQ"}


def pack(values: Mapping[str, Any], columns: Mapping[str, NDArray[Any]]) -> bytes:
    """Return JSON values and columns of integers as one block."""
    layout = [[name, column.dtype.str, column.shape] for name, column in columns.items()]
    head = json.dumps({"values": values, "columns": layout}).encode("utf-8", "surrogatepass")
    out = bytearray(len(head).to_bytes(_COUNT, "little")) + head
    for column in columns.values():
        out += bytes(-len(out) % _COUNT)
        out += np.ascontiguousarray(column).data.cast("B") if column.size else b""
    return bytes(out)


def unpack(block: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Invert `pack`; the columns are views of the block. Raises FormatError for anything else."""
    try:
        at = _COUNT + int.from_bytes(block[:_COUNT], "little")
        head = json.loads(block[_COUNT:at].decode("utf-8", "surrogatepass"))
        columns: dict[str, NDArray[Any]] = {}
        for name, code, shape in head["columns"]:
            if code not in _DTYPES:
                raise ValueError(f"a column of {code!r:.20}")
            dtype, count = np.dtype(code), prod(shape)
            at += -at % _COUNT
            # It reads nothing past the block's end: numpy refuses to.
            flat = np.frombuffer(block, dtype, count, at) if count else np.empty(0, dtype)
            columns[name] = flat.reshape(shape)
            at += flat.nbytes
        return head["values"], columns
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise FormatError(f"invalid message from another rank: {error}") from error
