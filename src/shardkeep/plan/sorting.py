"""Sort keys for columns of integers, and sorted columns without duplicates."""

from __future__ import annotations

import numpy as np

from shardkeep.types import I64

_MAX_KEY = 1 << 62


def joint_keys(group: I64, *values: I64) -> list[I64]:
    """Return an integer key for each (group, value), ordered by group and then by value.

    Args:
        group: [M] not negative.
        values: columns of [M], compared with one another as well.

    Returns:
        A column of keys for each column of values.
    """
    if not len(group):
        return [column.copy() for column in values]
    low = min(int(column.min()) for column in values)
    span = max(int(column.max()) for column in values) - low + 1
    if (int(group.max()) + 1) * span < _MAX_KEY:
        return [group * span + (column - low) for column in values]
    # Products of hostile coordinates would wrap around. Ranks are small, whatever the values.
    every = sorted_unique(np.concatenate(values))
    return [group * len(every) + np.searchsorted(every, column) for column in values]


def sorted_unique(column: I64) -> I64:
    """Return each number once, ascending. For many, sorting is faster than numpy's `unique`."""
    ordered = np.sort(column)
    fresh = np.ones(len(ordered), dtype=np.bool_)
    fresh[1:] = ordered[1:] != ordered[:-1]
    return ordered[fresh]
