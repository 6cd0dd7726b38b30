"""Rank processes that are started once per workload and called over pipes."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

__all__ = ["RankError", "RankPool"]

ROOT = Path(__file__).parent.parent
STARTING, GRACE = 120.0, 15.0
"""Seconds for ranks to start, and for the others to finish once one has failed."""
SOCKET = 70
"""Longest folder name with room for a socket below it; the kernel allows 108 bytes."""
_SET_PARENT_DEATH_SIGNAL = 1  # of prctl(2)


class RankError(RuntimeError):
    """A rank failed, ended or hangs. The message is the last line of its error."""


class RankPool:
    """Rank processes with one thread each; a single process uses all cores.

    A context manager: leaving it ends the processes and all that they started. Several ranks form
    a process group; a single one does only if `group` is set.
    """

    def __init__(
        self, ranks: int, folder: Path, *, group: bool = False, patience: float = 240.0
    ) -> None:
        self.ranks, self.group, self.patience = ranks, group or ranks > 1, patience
        self._folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._kept: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __enter__(self) -> RankPool:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(RankError):
            if self.processes:
                self.all("close")
        self._end()

    def all(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method of the `RankWorker` of every rank; return the results in rank order.

        Raises:
            RankError: the first error of any rank. Ranks that wait for the failed one are killed,
                and the next call starts new ones.
        """
        return self._call(range(self.ranks), method, args, kwargs)

    def one(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the `RankWorker` of rank 0 only; return its result."""
        return self._call([0], method, args, kwargs)[0]

    def keep(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method on all ranks, and again whenever the ranks are restarted."""
        found = self.all(method, *args, **kwargs)
        self._kept.append((method, args, kwargs))
        return found

    def drop(self, method: str, first: Any) -> None:
        """Forget the calls of a method with that first argument that `keep` has recorded."""
        self._kept = [one for one in self._kept if (one[0], one[1][0]) != (method, first)]

    def _call(
        self,
        ranks: Sequence[int],
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        patience: float | None = None,
    ) -> list[Any]:
        if not self.processes:
            self._start()
            for kept in self._kept:
                self._call(range(self.ranks), *kept)
        for rank in ranks:
            with suppress(OSError):
                self._pipes[rank].send((method, args, kwargs))
        answers: dict[int, Any] = {}
        errors: list[str] = []
        useless = self.ranks > 1  # after an error, the others may wait for the failed rank
        deadline = time.monotonic() + (patience or self.patience)
        while len(answers) < len(ranks):
            missing = [self._pipes[rank] for rank in ranks if rank not in answers]
            ready = wait(missing, max(0.0, deadline - time.monotonic()))
            if not ready:
                errors.append(f"no answer to {method} in {patience or self.patience:.0f} s")
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    fine, answers[rank] = pipe.recv()
                except (EOFError, OSError):
                    useless = True
                    fine, answers[rank] = (
                        False,
                        f"rank {rank} ended in {method}{self._output()}",
                    )
                if not fine:
                    errors.append(str(answers[rank]))
                    deadline = min(deadline, time.monotonic() + GRACE)
        if errors:
            if useless or len(answers) < len(ranks):
                self._end()
            raise RankError(errors[0])
        return [answers[rank] for rank in ranks]

    def _start(self) -> None:
        cores = os.cpu_count() or 1
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        variables = {
            "OMP_NUM_THREADS": str(cores if self.ranks == 1 else 1),
            "GLOO_SOCKET_IFNAME": "lo",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(self.ranks),
            "PYTHONWARNINGS": "ignore",
        }
        if len(str(self._folder)) < SOCKET:
            variables["TMPDIR"] = str(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            for rank in range(self.ranks):
                ours, theirs = Pipe()
                how = [str(rank), "group" if self.group else "alone"]
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "bench.ranks", str(theirs.fileno()), *how],
                        cwd=ROOT,
                        env=os.environ | variables | {"RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        pass_fds=[theirs.fileno()],
                        start_new_session=True,
                        preexec_fn=_end_with_parent,  # noqa: PLW1509 (there are no threads here)
                    )
                )
                theirs.close()
                self._pipes.append(ours)
        self._call(range(self.ranks), "settle", (), {}, STARTING)

    def _end(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):  # the whole session: stock torch starts helpers
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        for pipe in self._pipes:
            pipe.close()
        self.processes, self._pipes = [], []

    @property
    def _log(self) -> Path:
        return self._folder / f"ranks-{self.ranks}.log"

    def _output(self) -> str:
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


def last_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip().splitlines()[-1][:300]


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def main(pipe: Connection, rank: int, how: str) -> None:
    """Run a rank process: join the group, then answer calls until the pipe closes."""
    import torch.distributed as dist

    from bench.rank_worker import RankWorker

    ranks = int(os.environ["WORLD_SIZE"])
    if how == "group":
        dist.init_process_group("gloo")
    worker = RankWorker(rank, ranks)
    while True:
        try:
            method, args, kwargs = pipe.recv()
        except EOFError:
            os._exit(0)  # does not wait for threads that a contestant left running
        try:
            answer = (True, getattr(worker, method)(*args, **kwargs))
        except BaseException as error:
            traceback.print_exc()
            sys.stderr.flush()
            answer = (False, last_line(error))
        pipe.send(answer)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
