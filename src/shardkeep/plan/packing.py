"""Distribution of items over files."""

from __future__ import annotations

from heapq import heapify, heapreplace

import numpy as np

from shardkeep.types import I64

__all__ = ["pack"]


def pack(nbytes: I64, files: int) -> I64:
    """Distribute items over files of about equal size, largest first, each to the emptiest file.

    The fullest file exceeds the emptiest one by the largest item at most. The result depends on the
    arguments alone.

    Args:
        nbytes: [N] bytes of each item.
        files: number of files, at least 1.

    Returns:
        [N] file of each item, from 0 to `files` - 1.

    Raises:
        ValueError: there is no file.
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
        # An empty item counts as one byte, so that not all of them end up in one file.
        heapreplace(heap, (load + max(weights[item], 1), file))
    return chosen
