"""Many saves, one after another, in a process that may open 256 files: what they leave, as JSON."""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import shardkeep as sk
from support.memory import rss

WARM = 20
"""Saves after which it is measured what those that follow leave."""


def main(saves: int, path: str) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    mine = {str(n): torch.ones(1000) for n in range(100)} | {"big": torch.ones(1 << 18)}
    sizes, most, at = [], 0, [0.0]
    threads, files = [], []
    began = time.monotonic()
    for number in range(saves):
        # Not asked for: the next one waits for it.
        handle = sk.async_save({**mine, "n": number}, f"{path}/{'ab'[number % 2]}", overwrite=True)
        at.append(time.monotonic() - began)
        sizes.append(rss())
        most = max(most, _files())
        if number == WARM:
            _counted(handle, threads, files)
    _counted(handle, threads, files)
    tail = np.array(sizes[WARM:])
    return {
        "threads": threads,
        "files": files,
        "most files": most,
        "bytes per save": float(np.polyfit(np.arange(len(tail)), tail, 1)[0]),
        "seconds": at[-1],
        "slowest": float(np.diff(at).max()),
    }


def _counted(handle: Any, threads: list[int], files: list[int]) -> None:
    handle.result(60)
    while any(thread.name == "shardkeep-save" for thread in threading.enumerate()):
        time.sleep(0.01)  # it ends by itself, soon after its last save
    threads.append(threading.active_count())
    files.append(_files())


def _files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2])))
