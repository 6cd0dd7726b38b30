"""Measure what many successive saves leave behind, in a process that may open 256 files.

The result is printed as JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import shardkeep as sk
from support.memory import rss

WARM, EVERY = 20, 5
"""The number of saves before the first measurement, and between measurements.

Each measurement waits until no save is running, since a running save has some MB of buffers.
"""


def _asynchronous(path: str) -> Callable[[int, dict[str, Any]], Any]:
    """Save to two paths in turn."""
    return lambda n, state: sk.async_save(state, f"{path}/{'ab'[n % 2]}", overwrite=True)


def _managers(path: str) -> Callable[[int, dict[str, Any]], Any]:
    """Save by two managers in turn, each of which keeps one step."""
    both = [sk.Manager(f"{path}/{name}", keep=sk.KeepLast(1)) for name in "ab"]

    def save(number: int, state: dict[str, Any]) -> Any:
        manager = both[number % 2]
        manager.wait()  # until the previous step is deleted, so that only lasting growth is counted
        manager.save(number, state)
        return _SavedAndPruned(manager)

    return save


class _SavedAndPruned:
    """Waits until the last save of a manager is durable and old steps are deleted."""

    def __init__(self, manager: sk.Manager) -> None:
        self._manager = manager

    def result(self, timeout: float) -> None:
        self._manager.wait()


WAYS = {"async": _asynchronous, "managers": _managers}


def main(way: str, saves: int, path: str) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    mine = {str(n): torch.ones(1000) for n in range(100)} | {"big": torch.ones(1 << 18)}
    sizes, most, at = [], 0, [0.0]
    threads, files = [], []
    save = WAYS[way](path)
    began = time.monotonic()
    for number in range(saves):
        handle = save(number, {**mine, "n": number})  # The next save waits for it.
        at.append(time.monotonic() - began)
        most = max(most, _files())
        if number >= WARM and number % EVERY == 0:
            handle.result(60)
            sizes.append(rss())
            threads.append(threading.active_count())
            files.append(_files())
    return {
        "threads": threads,
        "files": files,
        "most files": most,
        # The median, and the total: malloc takes and keeps a megabyte or two once in a run.
        "bytes per save": float(np.median(np.diff(sizes))) / EVERY,
        "grown": max(sizes) - sizes[0],
        "seconds": at[-1],
        "slowest": float(np.diff(at).max()),
    }


def _files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
