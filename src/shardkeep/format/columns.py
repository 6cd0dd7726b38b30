"""Columns as bytes: how ranks send claims and reports to each other. No pickle."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.errors import FormatError

__all__ = ["pack", "unpack"]

_COUNT = 8


def pack(values: Mapping[str, Any], columns: Mapping[str, NDArray[Any]]) -> bytes:
    """JSON values and numpy columns as one block."""
    head = json.dumps({"values": values, "columns": list(columns)}).encode("utf-8", "surrogatepass")
    out = io.BytesIO()
    out.write(len(head).to_bytes(_COUNT, "little"))
    out.write(head)
    for column in columns.values():
        np.lib.format.write_array(out, np.ascontiguousarray(column), allow_pickle=False)
    return out.getvalue()


def unpack(block: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Inverse of `pack`. Raises FormatError for anything else."""
    source = io.BytesIO(block)
    length = int.from_bytes(source.read(_COUNT), "little")
    try:
        head = json.loads(source.read(length).decode("utf-8", "surrogatepass"))
        columns = {
            name: np.lib.format.read_array(source, allow_pickle=False) for name in head["columns"]
        }
        return head["values"], columns
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise FormatError(f"a message of another rank is broken: {error}") from error
