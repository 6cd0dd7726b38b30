"""Numbers for rows of columns, the same for equal rows."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.types import I64

__all__ = ["distinct"]

_MAX_TABLE_PER_ROW = 16
"""Up to this many possible contents per row, a table of all of them is faster than sorting."""


def distinct(columns: Sequence[NDArray[Any]]) -> tuple[I64, I64]:
    """Number the rows by their content, in ascending order; the first column is compared first.

    Args:
        columns: at least one column of [M].

    Returns:
        [M] number of each row, from 0 on, and the first row of each number.
    """
    varying = [column for column in columns if (column != column[:1]).any()]
    if not len(columns[0]):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    lows = [int(column.min()) for column in varying]
    spans = [int(column.max()) - low + 1 for column, low in zip(varying, lows, strict=True)]
    if prod(spans) <= _MAX_TABLE_PER_ROW * len(columns[0]):
        return _counted(varying, lows, spans, len(columns[0]))
    return _sorted(varying)


def _counted(
    columns: Sequence[NDArray[Any]], lows: Sequence[int], spans: Sequence[int], count: int
) -> tuple[I64, I64]:
    """Number rows without sorting, by marking their contents in a table of all possible ones."""
    key = np.zeros(count, dtype=np.int64)
    for column, low, span in zip(columns, lows, spans, strict=True):
        key = key * span + (column.astype(np.int64) - low)
    there = np.zeros(prod(spans), dtype=np.bool_)
    there[key] = True
    number = (np.cumsum(there) - 1)[key]
    first = np.empty(int(number.max()) + 1, dtype=np.int64)
    first[number[::-1]] = np.arange(count)[::-1]  # the last assignment to a number is its first row
    return number, first


def _sorted(columns: Sequence[NDArray[Any]]) -> tuple[I64, I64]:
    order = np.lexsort(columns[::-1])
    new = np.zeros(len(order), dtype=np.bool_)
    new[0] = True
    for column in columns:
        ordered = column[order]
        new[1:] |= ordered[1:] != ordered[:-1]
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.cumsum(new) - 1
    return number, order[new]
