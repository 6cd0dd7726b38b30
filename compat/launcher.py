"""Run a script once on each rank, and wait for all of them."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["RanksFailedError", "run_ranks"]


class RanksFailedError(Exception):
    """A rank that ended with an error or took too long; the message has its output."""


def run_ranks(
    python: str | os.PathLike[str],
    script: str | os.PathLike[str],
    arguments: Sequence[str | os.PathLike[str]],
    *,
    size: int = 1,
    limit: float = 300,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Start `size` processes that can form a gloo group; return what rank 0 wrote to stderr.

    Raises:
        RanksFailedError: a rank failed; the message is about the first one. The others are ended.
    """
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(size),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore",
        **(variables or {}),
    }
    command = [os.fspath(python), os.fspath(script), *map(os.fspath, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}" for rank in range(size)]
        ranks = []
        for rank, log in enumerate(logs):
            with log.open("w") as stream:
                variables_here = {**os.environ, **common, "RANK": str(rank)}
                ranks.append(
                    subprocess.Popen(command, env=variables_here, stdout=stream, stderr=stream)
                )
        try:
            _wait(ranks, logs, limit, Path(script).name)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return logs[0].read_text(errors="replace")


def _wait(
    ranks: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path], limit: float, what: str
) -> None:
    end = time.monotonic() + limit
    while any(process.poll() is None for process in ranks):
        for rank, process in enumerate(ranks):
            if process.poll():
                said = logs[rank].read_text(errors="replace")[-4000:]
                raise RanksFailedError(
                    f"{what}: rank {rank} ended with code {process.returncode}:\n{said}"
                )
        if time.monotonic() > end:
            said = "\n".join(log.read_text(errors="replace")[-1500:] for log in logs)
            raise RanksFailedError(f"{what}: not done after {limit} seconds:\n{said}")
        time.sleep(0.05)
    for rank, process in enumerate(ranks):
        if process.returncode:
            said = logs[rank].read_text(errors="replace")[-4000:]
            raise RanksFailedError(
                f"{what}: rank {rank} ended with code {process.returncode}:\n{said}"
            )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
