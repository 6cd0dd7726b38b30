"""Scenarios in which stock torch misbehaves, to be run with torch and with Shardkeep."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import shardkeep.dcp as dcp

BASES = {"stock": stock, "ours": dcp}


class FullDisk(FileSystem):
    """A file system that fails on data files of other threads, or on the second data file."""

    def __init__(self, *, in_threads: bool) -> None:
        super().__init__()
        self.in_threads, self.failed, self.opened = in_threads, threading.Event(), 0

    @contextmanager
    def create_stream(self, path, mode):
        if mode == "wb" and str(path).endswith(".distcp"):
            self.opened += 1
            main = threading.current_thread() is threading.main_thread()
            if not main if self.in_threads else self.opened == 2:
                self.failed.set()
                raise OSError(28, "No space left on device", str(path))
            if self.in_threads:
                self.failed.wait(10)
        with super().create_stream(path, mode) as stream:
            yield stream


class NoRename(FileSystem):
    """A file system whose renames fail."""

    def rename(self, path, new_path):
        raise OSError(5, "Input/output error", str(path))


def bytes_read(rank: int, size: int, base: str, path: str) -> int:
    """Return the bytes that a rank reads to load its rows of a matrix stored as one chunk."""
    mesh = init_device_mesh("cpu", (size,))
    local = DTensor.from_local(torch.zeros(2048 // size, 1024), mesh, [Shard(0)], run_check=False)
    dist.barrier()
    before = read_so_far()
    BASES[base].load({"w": local}, checkpoint_id=path)
    done = read_so_far() - before
    rows = torch.arange(2048 * 1024, dtype=torch.float32).view(2048, 1024)
    share = 2048 // size
    assert torch.equal(local.to_local(), rows[rank * share : (rank + 1) * share])
    return done


def read_so_far() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def stale_files(rank: int, size: int, base: str, path: str) -> None:
    """Save on four ranks, then on two ranks to the same path."""
    engine = BASES[base]
    engine.save({f"t{rank}": torch.ones(3)}, checkpoint_id=path)
    dist.barrier()
    group = dist.new_group([0, 1])
    if rank < 2:
        engine.save({f"t{rank}": torch.ones(3)}, checkpoint_id=path, process_group=group)
    dist.barrier()


class Broken:
    """A `Stateful` whose state dict fails on rank 1."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def state_dict(self) -> dict[str, Any]:
        if self.rank == 1:
            raise OSError("the loader's state is gone")
        return {"position": torch.tensor(3)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def lost_cause(rank: int, size: int, base: str, path: str, steps: bool) -> tuple[str, float]:
    """Return this rank's error when the state of one rank raises, and the seconds until then."""

    class Planner(stock.DefaultSavePlanner):
        def create_local_plan(self):
            return super().create_local_plan()

    group = dist.new_group(range(size), timeout=timedelta(seconds=3 if base == "stock" else 100))
    more = {"planner": Planner()} if steps else {}
    begin = time.monotonic()
    try:
        BASES[base].save({"loader": Broken(rank)}, checkpoint_id=path, process_group=group, **more)
    except BaseException as error:
        took = time.monotonic() - begin
        if base == "stock" and rank == 1:
            time.sleep(3.5)  # The rank goes on with other work.
        return f"{type(error).__name__}: {error}", took
    return "saved", time.monotonic() - begin
