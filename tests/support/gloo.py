"""Real ranks for tests: a pool of processes that keep torch imported and form a gloo group per run.

Importing torch costs seconds, so the processes outlive the tests. A process that died or hung is
replaced when it is needed next. This module itself does not import torch.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from operator import attrgetter
from pathlib import Path
from typing import Any

__all__ = ["Failed", "Pool"]

AFTER_FAILURE = 20.0
"""Seconds that the other ranks have left when one has failed: some of them may wait for it."""

AFTER_RUN = 10.0
"""Seconds to leave a group: torch up to 2.7 can hang there, with the interpreter's lock held."""

STARTING = 90.0


class Failed(Exception):
    """A failure of some ranks, with their errors as text and the results of the others by rank."""

    def __init__(self, errors: dict[int, str], results: dict[int, Any]) -> None:
        self.errors, self.results = errors, results
        super().__init__("\n".join(f"--- rank {r}:\n{text}" for r, text in sorted(errors.items())))


class Pool:
    """Processes that take part in gloo groups on 127.0.0.1; a context manager."""

    def __init__(self, most: int = 4) -> None:
        self._workers: list[_Worker | None] = [None] * most

    def run(
        self,
        function: Callable[..., Any] | str,
        *args: Any,
        size: int = 4,
        limit: float = 120.0,
        env: dict[str, str] | None = None,
    ) -> list[Any]:
        """Call `function(rank, size, *args)` on `size` ranks; return their results in rank order.

        The default process group is initialised during the call. Pass a function of the module
        level, or "module:function". Arguments and results are pickled, so results can't be of a
        class that a test file defines.

        Args:
            limit: seconds until ranks that have not finished are an error, which shows their
                stacks.
            env: environment variables to set during the call.

        Raises:
            Failed: a rank raised, died or took too long. All ranks that can finish have finished.
        """
        return self._run(_Job(_reference(function), args, size, env or {}), limit)

    def ranks(
        self,
        function: Callable[..., Any] | str,
        *args: Any,
        size: int = 4,
        limit: float = 120.0,
        env: dict[str, str] | None = None,
    ) -> list[Any]:
        """Call `function(ranks, *args)` on each rank, as `simulated_ranks.run` does; see `run`."""
        return self._run(_Job(_reference(function), args, size, env or {}, with_ranks=True), limit)

    def _run(self, job: _Job, limit: float) -> list[Any]:
        for rank in range(job.size):
            self._begin(rank)
        workers = [self._ready(rank) for rank in range(job.size)]
        end = time.monotonic() + limit
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        busy = {worker.pipe: rank for rank, worker in enumerate(workers)}
        workers[0].pipe.send((0, job, 0))
        while busy and (left := end - time.monotonic()) > 0:
            ready = wait(list(busy), min(left, 0.5))
            if not ready and all(workers[rank].is_stopped() for rank in busy.values()):
                break  # by SIGSTOP: they would never finish
            for pipe in ready:
                rank = busy[pipe]
                try:
                    kind, value = pipe.recv()
                except (EOFError, OSError):
                    kind, value = "error", workers[rank].end()
                    self._workers[rank] = None
                if kind == "port":
                    for other, worker in enumerate(workers[1:], 1):
                        worker.pipe.send((other, job, value))
                    continue
                del busy[pipe]
                if kind == "error":
                    errors[rank] = value
                    end = min(end, time.monotonic() + AFTER_FAILURE)
                else:
                    results[rank] = value
        for rank in busy.values():
            errors[rank] = f"not finished in time; its threads:\n{workers[rank].stacks()}"
        for rank in busy.values():
            workers[rank].end()
            self._workers[rank] = None
        if errors:
            raise Failed(errors, results)
        return [results[rank] for rank in range(job.size)]

    def _begin(self, rank: int) -> None:
        """Start the process if it is missing, without waiting, so that all import torch at once."""
        worker = self._workers[rank]
        if worker is None or not worker.is_ready(AFTER_RUN):
            if worker is not None:
                worker.end()
            self._workers[rank] = _Worker(rank)

    def _ready(self, rank: int) -> _Worker:
        worker = self._workers[rank]
        assert worker is not None
        if not worker.is_ready(STARTING):
            raise TimeoutError(f"process {rank} did not start:\n{worker.stacks()}")
        worker.ready = False
        return worker

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            if worker is not None:
                worker.end()


@dataclass(frozen=True)
class _Job:
    function: tuple[str, str]
    args: tuple[Any, ...]
    size: int
    env: dict[str, str] = field(default_factory=dict)
    with_ranks: bool = False


class _Worker:
    """The parent's end of one process."""

    def __init__(self, rank: int) -> None:
        self.ready = False
        descriptor, name = tempfile.mkstemp(prefix="stacks-")
        os.close(descriptor)
        self._dump = Path(name)
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        self.process = context.Process(
            target=_work, args=(child, name), name=f"gloo-{rank}", daemon=True
        )
        self.process.start()
        child.close()

    def is_ready(self, seconds: float) -> bool:
        """Return whether the process waits for a job before the time is over."""
        with suppress(EOFError, OSError):
            self.ready = self.ready or (self.pipe.poll(seconds) and self.pipe.recv() == "ready")
        return self.ready and self.process.is_alive()

    def is_stopped(self) -> bool:
        """Return whether a signal has stopped the process, which then never finishes."""
        try:
            status = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return False
        return status.rpartition(")")[2].split()[0] == "T"

    def stacks(self) -> str:
        """Return the present stacks of the process's threads."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.3)
        return self._dump.read_text()

    def end(self) -> str:
        """Kill the process; return how it had ended, if it had."""
        self.process.join(0.5 if self.process.exitcode is None else 0)
        how = f"the process ended with exit code {self.process.exitcode}"
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self._dump.unlink(missing_ok=True)
        return how


def _reference(function: Callable[..., Any] | str) -> tuple[str, str]:
    """Return the module and the name of a function.

    For a function of a test file, return the file's path, since pytest does not import those by
    name.
    """
    if isinstance(function, str):
        module, name = function.split(":")
        return module, name
    if "<" in function.__qualname__:
        raise ValueError(f"{function.__qualname__} is not on the module level")
    file = inspect.getfile(function)
    by_path = Path(file).name.startswith("test_")
    return file if by_path else function.__module__, function.__qualname__


def _resolve(where: str, name: str) -> Callable[..., Any]:
    if not where.endswith(".py"):
        return attrgetter(name)(importlib.import_module(where))
    module_name = f"in_gloo_{Path(where).stem}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, where)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return attrgetter(name)(sys.modules[module_name])


def _work(pipe: Connection, dump: str) -> None:
    """Run jobs in the child process until the parent closes the pipe."""
    # torch looks up the name of each client of a store, while all others wait. If a name server
    # drops the request, this takes 5 s, in the middle of a test of how long something takes.
    resolver = "timeout:1 attempts:1"
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", RES_OPTIONS=resolver)
    file = Path(dump).open("w")  # noqa: SIM115 - for as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    from torch import distributed as dist

    store = None  # rank 0 keeps the last run's server, as other ranks may still leave that group
    while True:
        pipe.send("ready")
        try:
            rank, job, port = pipe.recv()
        except EOFError:
            return
        try:
            store = dist.TCPStore(
                "127.0.0.1", port, is_master=rank == 0, wait_for_workers=False,
                timeout=timedelta(seconds=60),
            )  # fmt: skip
            if rank == 0:
                pipe.send(("port", store.port))
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=job.size, timeout=timedelta(seconds=60)
            )
            with _environment(job.env):
                result = _call(rank, job)
            pipe.send(("ok", result))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
        if dist.is_initialized():
            dist.destroy_process_group()


def _call(rank: int, job: _Job) -> Any:
    function = _resolve(*job.function)
    if not job.with_ranks:
        return function(rank, job.size, *job.args)
    from torch import distributed as dist

    from shardkeep.coordination import detect_ranks

    ranks = detect_ranks()
    dist.barrier()  # Connecting can take seconds, which tests must not measure.
    return function(ranks, *job.args)


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
