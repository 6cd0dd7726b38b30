"""Columns of integers, sorted: by two of them at once, or each number once."""

from __future__ import annotations

import numpy as np

from shardkeep.types import I64

_ROOM = 1 << 62


def joint_keys(group: I64, *values: I64) -> list[I64]:
    """One integer for each (group, value), ordered by group first and then by value.

    Args:
        group: [M] not negative.
        values: columns of [M], compared with one another as well.

    Returns:
        One column of keys for each column of values.
    """
    if not len(group):
        return [column.copy() for column in values]
    low = min(int(column.min()) for column in values)
    span = max(int(column.max()) for column in values) - low + 1
    if (int(group.max()) + 1) * span < _ROOM:
        return [group * span + (column - low) for column in values]
    # Products of hostile coordinates would wrap around: ranks are small, whatever the values.
    every = sorted_unique(np.concatenate(values))
    return [group * len(every) + np.searchsorted(every, column) for column in values]


def sorted_unique(column: I64) -> I64:
    """Each number once, ascending. Where there are many, sorting beats numpy's hashing `unique`."""
    ordered = np.sort(column)
    fresh = np.ones(len(ordered), dtype=np.bool_)
    fresh[1:] = ordered[1:] != ordered[:-1]
    return ordered[fresh]
