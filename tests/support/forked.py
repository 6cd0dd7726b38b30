"""Ranks that may die, forked from one process that has imported torch, so that each run is cheap.

Their TCPStore belongs to the process of the tests. So it outlives every rank, also rank 0, as the
store of a torchrun agent does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

__all__ = ["run"]


def run(
    function: Callable[..., Any],
    *args: Any,
    folder: Path,
    size: int = 4,
    limit: float = 120.0,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Return the result of `function(rank, *args)` on each rank; None for those that died or hung.

    The default process group is initialised. Results are written to `folder` as JSON.
    """
    from torch import distributed as dist

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.checkpoint", "shardkeep"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    files = [folder / f"rank_{rank}.json" for rank in range(size)]
    ranks = [
        context.Process(
            target=_rank, args=(rank, size, store.port, str(file), env or {}, function, args)
        )
        for rank, file in enumerate(files)
    ]
    for process in ranks:
        process.start()
    end = time.monotonic() + limit
    # A frozen rank never ends, so waiting ends when all others have.
    while time.monotonic() < end and sum(process.is_alive() for process in ranks) > 1:
        time.sleep(0.05)
    for process in ranks:
        process.join(2.0)
        process.kill()
        process.join()
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def _rank(
    rank: int,
    size: int,
    port: int,
    file: str,
    env: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(env | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    from torch import distributed as dist

    client = dist.TCPStore(
        "127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    dist.init_process_group("gloo", store=client, rank=rank, world_size=size)
    dist.barrier()
    try:
        result = function(rank, *args)
    except BaseException:
        result = traceback.format_exc()
    Path(file).with_suffix(".part").write_text(json.dumps(result))
    Path(file).with_suffix(".part").rename(file)
    os._exit(0)  # Leaving a group with dead members can hang.
