"""Which rows of some columns are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.types import I64

__all__ = ["distinct"]


def distinct(columns: Sequence[NDArray[Any]]) -> tuple[I64, I64]:
    """Number the rows by their content, in ascending order; the first column counts most.

    Args:
        columns: of [M], one at least.

    Returns:
        [M] each row's number, from 0 on, and for each number the first of its rows.
    """
    count = len(columns[0])
    varying = [column for column in columns if (column != column[:1]).any()]
    order = np.lexsort(varying[::-1]) if varying else np.arange(count)
    new = np.zeros(count, dtype=np.bool_)
    new[:1] = True
    for column in varying:
        ordered = column[order]
        new[1:] |= ordered[1:] != ordered[:-1]
    number = np.empty(count, dtype=np.int64)
    number[order] = np.cumsum(new) - 1
    return number, order[new]
