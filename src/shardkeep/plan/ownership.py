"""Which of the ranks that hold the same piece writes it."""

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
    """Choose one row for each key, so that the bytes are even over the ranks.

    A key that one rank holds stays there. Small keys go to a holder by hash. The `greedy` largest
    keys with a choice then go, largest first, to the holder that has least: so, where every rank
    holds everything and all keys are among them, no rank has more than the largest key above
    another. The order of the rows does not matter (among rows that agree in key and rank, any one
    is as good as the other, and one is taken).

    Args:
        key: [R] what is held: the same number means the same name and box.
        rank: [R] who holds it, not negative.
        nbytes: [R] its bytes, the same for all rows of a key.
        greedy: how many keys are placed by load.

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
    """Choose for each key the lowest rank that holds it, as `owners` does by load."""
    order = np.lexsort((rank, key))
    chosen = np.zeros(len(key), dtype=np.bool_)
    fresh = np.ones(len(key), dtype=np.bool_)
    fresh[1:] = key[order][1:] != key[order][:-1]
    chosen[order[fresh]] = True
    return chosen


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread 64 bits evenly (the finalizer of splitmix64): neighbouring keys part ways."""
    mixed: NDArray[np.uint64] = values + np.uint64(0x9E3779B97F4A7C15)
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * multiplier
    mixed ^= mixed >> np.uint64(31)
    return mixed
