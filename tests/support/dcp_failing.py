"""Planners and storage that fail in a given step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.futures import Future

import shardkeep.dcp as dcp
from support.scenarios import equal

__all__ = ["Failing", "killed", "replace", "save_twice"]

STEPS = """
    set_up_planner create_local_plan create_global_plan finish_plan resolve_data load_bytes
    resolve_tensor commit_tensor set_up_storage_writer set_up_storage_reader prepare_local_plan
    prepare_global_plan write_data read_data read_metadata finish
""".split()


class Failing:
    """The step that fails, and its ranks; "future" is the result of `write_data` or `read_data`."""

    def __init__(self) -> None:
        self.stop()

    def stop(self) -> None:
        self.step, self.who, self.error = "", (), None
        self.changed, self.change_it = "", None

    def at(self, step: str, who: Any, error: Callable[[int], BaseException]) -> None:
        self.step, self.who, self.error = step, who, error

    def change(self, step: str, function: Callable[[int, Any], Any]) -> None:
        """Let `function(rank, result)` change the result of a step."""
        self.changed, self.change_it = step, function

    def wrap(self, rank: int, given: Any) -> Any:
        """Make the steps of a planner, reader or writer fail; return it."""
        for name in STEPS:
            if hasattr(given, name):
                setattr(given, name, self._failing(rank, name, getattr(given, name)))
        return given

    def _failing(self, rank: int, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def called(*args: Any, **kwargs: Any) -> Any:
            if name == self.step and rank in self.who:
                fail(self.error(rank))
            result = method(*args, **kwargs)
            if self.step == "future" and rank in self.who and isinstance(result, Future):
                return Late(self.error(rank))
            return self.change_it(rank, result) if name == self.changed else result

        return called


def fail(error: BaseException) -> None:
    raise error


class Late:
    """A future of a user's own class, whose work fails."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def wait(self) -> None:
        fail(self.error)


def state(rank: int) -> dict[str, Any]:
    return {"w": torch.arange(4.0), f"own{rank}": torch.tensor([rank]), f"n{rank}": rank}


def save_twice(rank: int, size: int, path: str, step: str, who: list[int]) -> dict[str, Any]:
    """Save with a step that fails on some ranks, then again with the same objects."""
    failing = Failing()
    planner = failing.wrap(rank, stock.DefaultSavePlanner())
    writer = failing.wrap(rank, stock.FileSystemWriter(path))
    failing.at(step, who, lambda rank: OSError(f"disk {rank} is full"))
    begin = time.monotonic()
    try:
        dcp.save(state(rank), storage_writer=writer, planner=planner)
        raise AssertionError("it did not fail")
    except dcp.CheckpointException as error:
        failures = {r: (type(e).__name__, str(e)) for r, (e, _) in error.failures.items()}
        end = {"is_checkpoint_exception": True, "failures": failures}
    end.update(took=time.monotonic() - begin, committed=(Path(path) / ".metadata").exists())
    dist.barrier()
    failing.stop()
    dcp.save(state(rank), storage_writer=writer, planner=planner)
    loaded = {"w": torch.zeros(4), f"own{rank}": torch.tensor([-1]), f"n{rank}": None}
    dcp.load(loaded, checkpoint_id=path)
    return {**end, "then": "loaded" if equal(loaded, state(rank)) else loaded}


def killed(rank: int, size: int, path: str) -> dict[str, Any]:
    """Save while rank 2 is killed in `write_data`; return the error of this rank."""

    class Writer(stock.FileSystemWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            if rank == 2:
                time.sleep(0.8)  # Until the other ranks have received a heartbeat of this phase.
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write_data(plan, planner)

    begin = time.monotonic()
    try:
        dcp.save(state(rank), storage_writer=Writer(path))
    except BaseException as error:
        return {
            "is_checkpoint_exception": isinstance(error, dcp.CheckpointException),
            "failures": {
                r: type(e).__name__ for r, (e, _) in getattr(error, "failures", {}).items()
            },
            "phase": getattr(error, "phase", None),
            "took": time.monotonic() - begin,
        }
    raise AssertionError("it did not fail")
