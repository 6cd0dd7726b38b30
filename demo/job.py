"""A training job under torchrun: start it, follow its log, kill it, leave nothing behind."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["Job", "JobFailed", "adopt_orphans"]

ROOT = Path(__file__).parent.parent
LINUX = sys.platform == "linux"
_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # prctl(2)


class JobFailed(RuntimeError):
    """The job ended although nobody killed it. The message is the end of what it printed."""


class Job:
    """`ranks` processes of the observed training job, and the launcher above them.

    Use it as a context: leaving it ends whatever still runs.
    """

    def __init__(self, ranks: int, folder: Path, options: Sequence[str]) -> None:
        self.ranks, self.log = ranks, folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.log.touch()
        self.position = self.log.stat().st_size
        self.workers: list[int] = []
        self.killed = False
        self.output = (folder / f"output_{ranks}_ranks.txt").open("w+")
        launcher = (
            f"-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node {ranks}"
        )
        self.launcher = subprocess.Popen(
            [sys.executable, *launcher.split(), "-m", "demo.witness", str(folder), *options],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent if LINUX else None,
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self.launcher.poll() is None:
            self.launcher.terminate()  # torchrun ends its workers, then itself
            with suppress(subprocess.TimeoutExpired):
                self.launcher.wait(10)
        self.kill()
        self.output.close()

    def records(self) -> Iterator[dict[str, Any]]:
        """What the job logs, as it comes, until it ends.

        Raises:
            JobFailed: it ended by itself, with an error.
        """
        while True:
            ended = self.killed or self.launcher.poll() is not None
            with self.log.open() as log:
                log.seek(self.position)
                while (line := log.readline()).endswith("\n"):
                    self.position = log.tell()
                    record = json.loads(line)
                    if "pid" in record:
                        self.workers.append(record["pid"])
                    yield record
            if ended:
                break
            time.sleep(0.005)
        if self.launcher.returncode and not self.killed:
            self.output.seek(0)
            raise JobFailed(f"exit code {self.launcher.returncode}\n{self.output.read()[-6000:]}")

    def kill(self) -> list[int]:
        """SIGKILL for every process of the job, all at once.

        Returns:
            The signal that ended each of them, as the kernel reports it to their parent: the
            launcher's first, then the workers' (only on Linux, where `adopt_orphans` works).
        """
        for pid in (self.launcher.pid, *self.workers):
            if pid != self.launcher.pid or self.launcher.returncode is None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        signals = [-self.launcher.wait()]
        for pid in self.workers:
            with suppress(ChildProcessError):  # the launcher has seen to it
                signals.append(os.WTERMSIG(os.waitpid(pid, 0)[1]))
        self.workers.clear()
        self.killed = True
        return signals


def environment() -> dict[str, str]:
    """One thread a rank, and no network but the loopback."""
    here = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo" if LINUX else "lo0"}
    return {**os.environ, **here, "TORCH_CPP_LOG_LEVEL": "ERROR"}


def adopt_orphans() -> None:
    """Become the parent of workers whose launcher was killed: nobody else would see them end."""
    if LINUX:
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_with_parent() -> None:
    """A launcher whose demo was killed gets SIGTERM, and ends its workers."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
