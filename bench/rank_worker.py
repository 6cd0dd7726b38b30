"""The worker in a rank process: holds states and contestants and runs the calls of the pool."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from bench import states
from bench.competitors import Contestant, Pending, make
from bench.measure import Sample, timed

__all__ = ["RankWorker"]


class RankWorker:
    """The methods that a `RankPool` calls by name, on all ranks or on one."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.mesh = init_device_mesh("cpu", (ranks,)) if ranks > 1 else None
        self.states: dict[str, states.State] = {}
        self.entries: dict[str, Contestant] = {}

    def build(self, name: str, kind: str, amount: int, split: str = "rows") -> tuple[int, int]:
        """Build a state; return the bytes that this rank holds and the number of tensors."""
        state = states.build(kind, amount, rank=self.rank, mesh=self.mesh, split=split)
        self.states[name] = state
        return states.nbytes_of(state), len(state)

    def enter(self, entry: str, who: str, settings: Mapping[str, Any]) -> None:
        """Create a contestant for an entry, in place of the previous one."""
        self.leave(entry)
        self.entries[entry] = make(who, self.rank, self.ranks, settings)

    def leave(self, entry: str) -> None:
        old = self.entries.pop(entry, None)
        if old is not None:
            old.close()

    def save(self, entry: str, state: str, path: Path) -> Sample:
        contestant = self.entries[entry]
        self._together()
        return timed(lambda: contestant.save(self.states[state], path))

    def load(self, entry: str, state: str, path: Path, check: bool = False) -> Sample:
        """Fill a state; with `check`, clear it first and compare every element afterwards."""
        contestant = self.entries[entry]
        if check:
            states.clear(self.states[state])
        self._together()
        sample = timed(lambda: contestant.load(self.states[state], path))
        if check:
            states.check(self.states[state], self.rank)
        return sample

    def begin(self, entry: str, state: str, path: Path) -> Sample:
        """Save in the background; the sample is the stall, its figure the time until durable."""
        contestant = self.entries[entry]
        begun: list[Pending] = []
        self._together()
        stall = timed(lambda: begun.append(contestant.begin(self.states[state], path)))
        begun[0].result()
        durable = time.perf_counter() - stall.begin
        return Sample(
            stall.begin, stall.end, stall.cpu, stall.peak, stall.read, {"durable": durable}
        )

    def check_saved(self, state: str, path: Path) -> None:
        """Load a checkpoint in DCP's format into the cleared state and compare every element."""
        import shardkeep

        try:
            states.clear(self.states[state])
            shardkeep.load(self.states[state], path)
            states.check(self.states[state], self.rank)
        except BaseException:
            states.fill(self.states[state], self.rank)
            raise

    def warm(self, path: Path) -> None:
        """Read this rank's share of the files of a folder into the page cache."""
        buffer = memoryview(bytearray(4 << 20))
        for file in _share(path, self.rank, self.ranks):
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass

    def cool(self, paths: list[Path]) -> str:
        """Drop the files of these folders from the page cache, on one rank; return how."""
        os.sync()
        try:
            Path("/proc/sys/vm/drop_caches").write_text("3")
        except OSError:
            for path in paths:
                for file in _share(path, 0, 1):
                    number = os.open(file, os.O_RDONLY)
                    os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(number)
            return "posix_fadvise(DONTNEED): drop_caches is not allowed here"
        return "drop_caches"

    def do(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of one workload (see `solo`) with this worker."""
        return work(self, *args, **kwargs)

    def settle(self) -> None:
        """Wait until everything written before is on the disk."""
        os.sync()

    def close(self) -> None:
        for entry in list(self.entries):
            self.leave(entry)

    def _together(self) -> None:
        if self.ranks > 1:
            dist.barrier()


def _share(path: Path, rank: int, ranks: int) -> list[Path]:
    return sorted(one for one in path.rglob("*") if one.is_file())[rank::ranks]
