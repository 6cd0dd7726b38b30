"""The limits of the machine: the bare system calls, or the bare copy, for the same bytes.

They have the interface of the contestants (see `competitors`), so they run in the same rounds.
"""

from __future__ import annotations

import itertools
import mmap
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.states import State, locals_of, nbytes_of

__all__ = ["Copy", "Crc", "DirectRead", "DirectWrite", "Preadv", "RawWriterProcess"]

PAGE = 4096
WRITE, CACHED = 8 << 20, 4 << 20
"""Bytes of one system call."""


class _Raw:
    """Reads or writes one file per rank, of as many bytes as the rank's part of the state."""

    def __init__(self, rank: int, ranks: int, *, threads: int = 2) -> None:
        self.rank, self.threads = rank, threads

    def file(self, path: Path) -> Path:
        return path / f"raw-{self.rank}"

    def close(self) -> None:
        pass


class DirectWrite(_Raw):
    """O_DIRECT writes from prepared memory into a file that was allocated in one call."""

    _ready: memoryview | None = None

    def save(self, state: State, path: Path) -> None:
        """Write the file. The first call copies the state to memory that direct writes accept.

        The bytes of a real state are used since disks write constant bytes at another speed.
        """
        if self._ready is None:
            self._ready = memoryview(mmap.mmap(-1, -(-nbytes_of(state) // PAGE) * PAGE))
            for memory, at in _segments(state):
                self._ready[at : at + len(memory)] = memory
        path.mkdir(exist_ok=True)
        direct_write(self.file(path), self._ready, nbytes_of(state), self.threads)

    def close(self) -> None:
        self._ready = None


class Preadv(_Raw):
    """Reads from the page cache directly into the tensors."""

    def load(self, state: State, path: Path) -> dict[str, float]:
        file = os.open(self.file(path), os.O_RDONLY)
        try:
            in_threads(self.threads, _segments(state), lambda s: _fill(file, *s))
        finally:
            os.close(file)
        return {}


class DirectRead(_Raw):
    """Reads that bypass the page cache, `mib` MiB per call, into reused buffers."""

    def __init__(self, rank: int, ranks: int, *, threads: int = 2, mib: int = 2) -> None:
        super().__init__(rank, ranks, threads=threads)
        self._nbytes = mib << 20

    def load(self, state: State, path: Path) -> dict[str, float]:
        file = os.open(self.file(path), os.O_RDONLY | _direct())
        try:
            starts = range(0, os.fstat(file).st_size, self._nbytes)
            _with_buffers(
                self.threads, self._nbytes, starts, lambda b, at: os.preadv(file, [b], at)
            )
        finally:
            os.close(file)
        return {}


class Copy:
    """A copy by torch into memory that was touched before, with all threads of torch."""

    def __init__(self, rank: int, ranks: int) -> None:
        self._twin: State = {}

    def begin(self, state: State, path: Path) -> Future[None]:
        source = locals_of(state)
        if not self._twin:
            self._twin = {name: tensor.clone() for name, tensor in source.items()}
        for name, tensor in source.items():
            self._twin[name].copy_(tensor)
        copied: Future[None] = Future()
        copied.set_result(None)
        return copied

    def close(self) -> None:
        self._twin.clear()


class RawWriterProcess:
    """Direct writes of as many bytes by another process, which shares only the machine with this
    one.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.raw_writer"],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(self, state: State, path: Path) -> Future[None]:
        assert self._process.stdin is not None
        path.mkdir(exist_ok=True)
        print(nbytes_of(state), path.resolve(), file=self._process.stdin, flush=True)
        written: Future[None] = Future()
        threading.Thread(target=self._wait, args=(written,)).start()
        return written

    def _wait(self, written: Future[None]) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline() == "done\n":
            written.set_result(None)
        else:
            written.set_exception(RuntimeError("the writing process has ended"))

    def close(self) -> None:
        self._process.communicate()


class Crc:
    """Checksums of what a save writes, computed block by block on the bytes in place."""

    block = 256 * 1024

    def __init__(self, rank: int, ranks: int) -> None:
        pass

    def save(self, state: State, path: Path) -> dict[str, float]:
        """Return the seconds for all blocks at the median speed, as some blocks are interrupted."""
        from shardkeep.io.checksums import crc32_at

        speeds, nbytes = [], 0
        for memory, _ in _segments(state, self.block):
            address = np.frombuffer(memory, np.uint8).ctypes.data
            began = time.perf_counter()
            crc32_at(address, memory)
            if len(memory) == self.block:
                speeds.append((time.perf_counter() - began) / self.block)
            nbytes += len(memory)
        return {"crc": statistics.median(speeds) * nbytes} if speeds else {}

    def close(self) -> None:
        pass


def direct_write(path: Path, memory: memoryview, nbytes: int, threads: int) -> None:
    """Write a durable file of `nbytes` bytes from whole pages of memory."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | _direct(), 0o644)
    try:
        if memory:
            os.posix_fallocate(file, 0, len(memory))

        def write(at: int) -> None:
            part = memory[at : at + WRITE]
            while part:
                written = os.pwrite(file, part, at)
                at, part = at + written, part[written:]

        in_threads(threads, range(0, len(memory), WRITE), write)
        os.ftruncate(file, nbytes)
        os.fsync(file)
    finally:
        os.close(file)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _direct() -> int:
    return getattr(os, "O_DIRECT", 0)


_landings: dict[tuple[int, int], memoryview] = {}
"""Buffers of direct reads by their number and size, reused by later reads."""


def _with_buffers(
    threads: int, nbytes: int, starts: Iterable[int], call: Callable[[memoryview, int], Any]
) -> None:
    mine = threading.local()

    def one(at: int) -> None:
        if not hasattr(mine, "buffer"):
            number = next(taken)
            if (number, nbytes) not in _landings:
                _landings[number, nbytes] = memoryview(mmap.mmap(-1, nbytes))
            mine.buffer = _landings[number, nbytes]
        call(mine.buffer, at)

    taken = itertools.count()
    in_threads(threads, starts, one)


def in_threads(threads: int, jobs: Iterable[Any], call: Callable[[Any], Any]) -> None:
    """Call `call` once for each job, from that many threads."""
    waiting, errors = iter(list(jobs)), []

    def work() -> None:
        try:
            for job in waiting:
                call(job)
        except BaseException as error:
            errors.append(error)

    others = [threading.Thread(target=work) for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    work()
    for thread in others:
        thread.join()
    if errors:
        raise errors[0]


def _segments(state: State, size: int = CACHED) -> Sequence[tuple[memoryview, int]]:
    """Return the memory of the tensors in parts, each with its offset in a file."""
    segments, at = [], 0
    for tensor in locals_of(state).values():
        memory = memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())
        for start in range(0, len(memory), size):
            part = memory[start : start + size]
            segments.append((part, at))
            at += len(part)
    return segments


def _fill(file: int, memory: memoryview, at: int) -> None:
    while memory:
        count = os.preadv(file, [memory], at)
        if not count:
            raise EOFError(f"the file ends at byte {at}, before the state is complete")
        at, memory = at + count, memory[count:]
