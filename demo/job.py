"""A training job under torchrun: start it, follow its log, kill it, end all its processes."""

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

__all__ = ["ROOT", "Job", "JobFailed", "adopt_orphans", "environment", "left_behind"]

ROOT = Path(__file__).parent.parent

_LINUX = sys.platform == "linux"
_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)
_SILENCE = 120.0
"""Seconds without a line in the log after which a job counts as hanging."""


class JobFailed(RuntimeError):
    """The job failed, ended early or hangs. The message ends with its output."""


class Job:
    """The recorded training job: `ranks` processes and torchrun, their parent.

    A context manager: leaving it ends all processes that still run.
    """

    def __init__(self, ranks: int, folder: Path, options: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "log.jsonl"
        self._log.touch()
        self._position = self._log.stat().st_size
        self._workers: list[int] = []
        self._killed = False
        self._output = (folder / f"output_{ranks}_ranks.txt").open("w+")
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        job = [f"--nproc-per-node={ranks}", "-m", "demo.recorder", str(folder), *options]
        self._launcher = subprocess.Popen(
            [sys.executable, *torchrun, *job],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 (there are no threads here)
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self._launcher.poll() is None:
            self._launcher.terminate()  # torchrun ends its workers, then itself
            with suppress(subprocess.TimeoutExpired):
                self._launcher.wait(10)
        if self._launcher.returncode is None:
            self.kill()
        for pid in _children():  # workers without torchrun that had not yet logged their pid
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._output.close()

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records of the job's log until the job ends.

        Raises:
            JobFailed: the job failed or hangs.
        """
        heard = time.monotonic()
        while True:
            ended = self._killed or self._launcher.poll() is not None
            for record in self._new_records():
                heard = time.monotonic()
                yield record
            if ended:
                break
            if time.monotonic() - heard > _SILENCE:
                raise JobFailed(f"no line in the log for {_SILENCE:.0f} s\n{self._printed()}")
            time.sleep(0.01)
        if self._launcher.returncode and not self._killed:
            raise JobFailed(f"exit code {self._launcher.returncode}\n{self._printed()}")

    def kill(self) -> list[int]:
        """Send SIGKILL to every process of the running job.

        Returns:
            The signal that ended each process, as the kernel reports it: first that of torchrun,
            then those of the workers. This needs `adopt_orphans`, which works on Linux only.
        """
        if self._launcher.poll() is not None:
            raise JobFailed(f"the job ended before it was killed\n{self._printed()}")
        for pid in (self._launcher.pid, *self._workers):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        signals = [-self._launcher.wait()]
        for pid in self._workers:
            with suppress(ChildProcessError):  # torchrun has waited for it before it ended
                signals.append(os.WTERMSIG(os.waitpid(pid, 0)[1]))
        self._workers.clear()
        self._killed = True
        return signals

    def _new_records(self) -> Iterator[dict[str, Any]]:
        with self._log.open() as log:
            log.seek(self._position)
            while (line := log.readline()).endswith("\n"):
                self._position = log.tell()
                record = json.loads(line)
                if "pid" in record:
                    self._workers.append(record["pid"])
                yield record

    def _printed(self) -> str:
        self._output.seek(0)
        return self._output.read()[-6000:]


def environment() -> dict[str, str]:
    """Return an environment with one thread per rank and only the loopback network."""
    loopback = "lo" if _LINUX else "lo0"
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback}


def adopt_orphans() -> None:
    """Become the parent of workers whose torchrun was killed, to learn how they end."""
    if _LINUX:
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def left_behind() -> int:
    """Return the number of processes that this process started or adopted and that still run."""
    left = 0
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            left += 1
        left = max(left + 1, len(_children()))
    return left


def _children() -> list[int]:
    with suppress(OSError):
        return [int(pid) for pid in Path("/proc/thread-self/children").read_text().split()]
    return []


def _end_with_parent() -> None:
    """Let torchrun get SIGTERM when the demo is killed, so that it ends its workers."""
    if _LINUX:
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
