"""Choice of the rank that writes a piece which several ranks hold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardkeep.types import I64

__all__ = ["lowest", "owners"]

_GREEDY = 16_384
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def owners(
    key: I64,
    rank: I64,
    nbytes: I64,
    *,
    greedy: int = _GREEDY,
) -> NDArray[np.bool_]:
    """Choose one row for each key, so that all ranks write about equally many bytes.

    A key with one holder stays there. Small keys go to a holder by hash. Then the `greedy` largest
    keys with several holders go, largest first, to the holder with the fewest bytes. If all ranks
    hold everything and all keys are among these, ranks differ by the largest key at most. The order
    of the rows does not matter. Of rows with the same key and rank, any one is chosen.

    Args:
        key: [R] number of a piece, the same for the same name and box.
        rank: [R] rank that holds it, not negative.
        nbytes: [R] bytes of the piece, the same for all rows of a key.
        greedy: number of keys that are assigned by load.

    Returns:
        [R] True for exactly one row of each key.
    """
    chosen = np.zeros(len(key), dtype=np.bool_)
    if not len(key):
        return chosen
    order = np.lexsort((rank, key))
    key, rank = key[order], rank[order]
    weight = np.maximum(nbytes[order], 1)
    mixed = _mix(key.astype(np.uint64))
    fresh = np.ones(len(key), dtype=np.bool_)
    fresh[1:] = (key[1:] != key[:-1]) | (rank[1:] != rank[:-1])
    order, key, rank, weight = order[fresh], key[fresh], rank[fresh], weight[fresh]
    mixed = mixed[fresh]
    first = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
    count = np.diff(np.append(first, len(key)))
    pick = first + (mixed[first] % count.astype(np.uint64)).astype(np.int64)

    free = np.flatnonzero(count > 1)
    free = free[np.lexsort((mixed[first[free]], -weight[first[free]]))][:greedy]
    settled = np.ones(len(first), dtype=np.bool_)
    settled[free] = False
    load = np.zeros(int(rank.max()) + 1, dtype=np.int64)
    np.add.at(load, rank[pick[settled]], weight[pick[settled]])
    for group, start, length in zip(
        free.tolist(), first[free].tolist(), count[free].tolist(), strict=True
    ):
        holders = rank[start : start + length]
        best = int(load[holders].argmin())
        pick[group] = start + best
        load[holders[best]] += weight[start]
    chosen[order[pick]] = True
    return chosen


def lowest(key: I64, rank: I64) -> NDArray[np.bool_]:
    """Return True for one row of each key: that of the lowest rank which holds it."""
    order = np.lexsort((rank, key))
    chosen = np.zeros(len(key), dtype=np.bool_)
    fresh = np.ones(len(key), dtype=np.bool_)
    fresh[1:] = key[order][1:] != key[order][:-1]
    chosen[order[fresh]] = True
    return chosen


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a hash of each value, so that neighbouring keys differ (finalizer of splitmix64)."""
    mixed: NDArray[np.uint64] = values + np.uint64(0x9E3779B97F4A7C15)
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * multiplier
    mixed ^= mixed >> np.uint64(31)
    return mixed
