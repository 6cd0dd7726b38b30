"""Which file each item goes to."""

from __future__ import annotations

from heapq import heapify, heapreplace

import numpy as np

from shardkeep.types import I64

__all__ = ["pack"]


def pack(nbytes: I64, files: int) -> I64:
    """Share items out over files, even in bytes: the largest first, each to the emptiest file.

    The fullest file holds at most the largest item more than the emptiest one. Inside a file, items
    stay in the given order. The same input gives the same answer everywhere.

    Args:
        nbytes: [N] bytes of each item.
        files: how many files there are, at least 1.

    Returns:
        [N] the file of each item, 0 to `files` - 1.
    """
    if files < 1:
        raise ValueError(f"files must be at least 1, not {files}")
    chosen = np.zeros(len(nbytes), dtype=np.int64)
    if files == 1:
        return chosen
    order = np.argsort(-nbytes, kind="stable").tolist()
    weights = nbytes.tolist()
    heap = [(0, file) for file in range(files)]
    heapify(heap)
    for item in order:
        load, file = heap[0]
        chosen[item] = file
        # An empty item weighs a little, or all of them would end in one file.
        heapreplace(heap, (load + max(weights[item], 1), file))
    return chosen
