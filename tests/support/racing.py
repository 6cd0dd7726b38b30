"""Processes that commit to one path at the same time, repeatedly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Outcome", "Racer", "racers", "serve"]


class Outcome(NamedTuple):
    """How a save of one process ended: "saved", or the name and text of its error."""

    end: str
    text: str
    save_id: str


class Racer:
    """A process that saves on request, and waits just before each commit."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.racing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )

    def start(self, path: Path, seed: int, *, overwrite: bool, how: str = "save") -> None:
        """Start a save, which stops before it writes its commit record."""
        self._tell(json.dumps([str(path), seed, overwrite, how]))

    def wait(self) -> None:
        """Wait until the save stops before its commit."""
        assert self._line() == "ready"

    def go(self) -> None:
        """Let the save commit."""
        self._tell("go")

    def finish(self) -> Outcome:
        """Wait for the end of the save."""
        return Outcome(*json.loads(self._line()))

    def _tell(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def _line(self) -> str:
        line = self.process.stdout.readline()
        assert line, "the process has ended"
        return line.rstrip("\n")


@contextmanager
def racers(count: int = 2) -> Iterator[list[Racer]]:
    """Start some of these processes, and end them after the block."""
    started = [Racer() for _ in range(count)]
    try:
        yield started
    finally:
        for racer in started:
            racer.process.stdin.close()
        for racer in started:
            racer.process.wait(30)


def serve() -> None:
    """Save for each request, one per line of standard input."""
    import warnings

    import torch

    import shardkeep as sk
    import shardkeep.dcp as dcp
    from shardkeep.checkpoint import commit
    from shardkeep.checkpoint.reader import open_reader

    warnings.simplefilter("ignore")
    put_record = commit.put_record

    def put_record_on_request(*args: Any, **kwargs: Any) -> None:
        print("ready", flush=True)
        assert sys.stdin.readline() == "go\n"
        put_record(*args, **kwargs)

    commit.put_record = put_record_on_request  # type: ignore[assignment]

    class OwnPlanner(dcp.DefaultSavePlanner):
        """A planner of a user's own class: the drop-in commits then, instead of the engine."""

    def save(path: str, seed: int, overwrite: bool, how: str) -> str:
        state = {"w": torch.arange(20.0) + seed, "n": seed}
        if how == "save":
            return sk.save(state, path, overwrite=overwrite).save_id
        writer = dcp.FileSystemWriter(path, overwrite=overwrite)
        dcp.save(state, storage_writer=writer, planner=OwnPlanner(), no_dist=True)
        return open_reader(path).found.trailer.save_id

    for line in sys.stdin:
        path, seed, overwrite, how = json.loads(line)
        try:
            answer = Outcome("saved", "", save(path, seed, overwrite, how))
        except BaseException as error:
            # The drop-in wraps errors of the coordinator.
            inner = [*getattr(error, "failures", {}).values()]
            real = inner[0][0] if inner else error
            answer = Outcome(type(real).__name__, str(real), "")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
