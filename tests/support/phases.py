"""Saves and loads with an event on one rank at the start of a phase."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import shardkeep as sk
from shardkeep.coordination.timing import Clock

PHASES = {
    "save": ["describe", "assign", "write", "sync", "report", "commit"],
    "async_save": ["describe", "assign", "stage", "write", "sync", "report", "commit"],
    "load": ["open", "describe", "match", "read"],
}
ALL = [(work, phase) for work, phases in PHASES.items() for phase in phases]


@contextmanager
def happening(phase: str, rank: int, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` on one rank when a save or load in the block begins the phase."""
    begin = Clock.phase

    def phase_begins(clock: Clock, name: str) -> None:
        begin(clock, name)
        if name == phase and clock._session.rank == rank:
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Clock, "phase", phase_begins)
        yield


def state(rank: int, size: int, seed: float) -> dict[str, Any]:
    """Return a state with a tensor sharded by hand, and values of each rank's own."""
    part = torch.arange(300.0).reshape(3, 100) + 1000 * rank + seed
    return {
        "w": sk.Shards((3 * size, 100), [((3 * rank, 0), part)]),
        f"mine{rank}": torch.full((5,), rank + seed),
        f"number{rank}": rank + seed,
    }


def do(work: str, rank: int, size: int, path: str, seed: float, ranks: Any = None) -> Any:
    """Run a save, an asynchronous save or a load, and wait for its end."""
    mine = state(rank, size, seed)
    if work == "load":
        return sk.load(mine, path, ranks=ranks)
    if work == "save":
        return sk.save(mine, path, overwrite=True, ranks=ranks)
    return sk.async_save(mine, path, overwrite=True, ranks=ranks).result(60)


def ended(work: Callable[[], Any]) -> dict[str, Any]:
    """Return how a call ended, and when."""
    try:
        work()
    except sk.RankFailed as error:
        known = {"rank": error.rank, "phase": error.phase, "path": error.path, "host": error.host}
        return {"end": "told", "cause": error.cause, **known, "at": time.time()}
    except BaseException as error:
        return {"end": type(error).__name__, "text": str(error), "at": time.time()}
    return {"end": "done", "at": time.time()}


def gone(rank: int, work: str, phase: str, culprit: int, how: str, path: str) -> dict[str, Any]:
    """Run on a real rank while the culprit is killed, freezes or sleeps in the phase."""
    size = 4
    do("save", rank, size, path, 0.0)

    def act() -> None:
        Path(f"{path}.happened").write_text(str(time.time()))
        if how == "asleep":
            time.sleep(40)
        os.kill(os.getpid(), {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP}[how])

    with happening(phase, culprit, act):
        return ended(lambda: do(work, rank, size, path, 0.5))
