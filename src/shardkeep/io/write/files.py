"""Data files, written window by window by several threads in one pass over the data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from types import TracebackType
from typing import NamedTuple

import numpy as np

from shardkeep import settings
from shardkeep.io.arena import allocate_pages
from shardkeep.io.contract import Payloads
from shardkeep.io.pool import ProgressMeter, parallel
from shardkeep.io.write.windows import FileWindows
from shardkeep.plan.file_layout import lay_out
from shardkeep.plan.memory_budget import MemoryBudget
from shardkeep.stores.abilities import PositionedWriter, SupportsPositionedWrites
from shardkeep.stores.contract import Store, Writer
from shardkeep.types import I64, Progress

__all__ = [
    "WriterSettings",
    "choose_writers",
    "copy_threads",
    "naming_file",
    "open_targets",
    "write_plain_file",
    "write_windows",
]


class WriterSettings(NamedTuple):
    """How files are written.

    Attributes:
        threads: number of threads that make and write windows.
        max_window_bytes: size limit of a window.
    """

    threads: int
    max_window_bytes: int


def choose_writers(
    ranks_here: int, budget: MemoryBudget, *, asynchronous: bool = False
) -> WriterSettings:
    """Return the fastest way of writing for this machine, within a memory budget.

    Measured on 2 cores: 2 threads in one process, 1 thread in each of 4 (docs/decisions, "How bytes
    are written").

    Args:
        ranks_here: number of ranks on this machine.
        budget: memory for the windows of this rank.
        asynchronous: the caller goes on while files are written. Then one thread writes: threads
            that return from the kernel to the interpreter delay the caller and each other.
    """
    most = 1 if asynchronous else 4
    threads = settings.write_threads() or _clamp(settings.cores() // ranks_here, 1, most)
    threads = budget.write_threads(threads)
    return WriterSettings(threads, budget.window_bytes(threads))


def copy_threads(ranks_here: int) -> int:
    """Return how many threads of each rank it takes to fill the memory's bandwidth."""
    return _clamp(settings.cores() // ranks_here, 1, 8)


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))


@contextlib.contextmanager
def naming_file(name: str) -> Iterator[None]:
    """Add the name of a file to an `OSError` that does not name it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and name not in str(error):
            if error.errno is None:
                error.args = (f"{name}: {error}",)
            else:
                error.filename = name
        raise


@contextlib.contextmanager
def open_targets(store: Store, files: Sequence[FileWindows]) -> Iterator[list[PositionedWriter]]:
    """Create the files and reserve their space; when the block is left, they are durable.

    The caller must call `store.sync()` to make their names durable, too. After an error all of them
    are removed.

    Raises:
        OSError: from the store, naming the file.
    """
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_target(store, file)) for file in files]


def _target(store: Store, file: FileWindows) -> PositionedWriter:
    with naming_file(file.name):
        if store.hints.positioned_writes and isinstance(store, SupportsPositionedWrites):
            return store.open_positioned_writer(file.name, file.layout.nbytes)
        return _SequentialTarget(file.name, store.open_writer(file.name), file.layout.nbytes)


class _SequentialTarget(PositionedWriter):
    """A file in a store that can only write from front to back."""

    def __init__(self, name: str, writer: Writer, nbytes: int) -> None:
        self._name, self._writer, self._left = name, writer, nbytes

    def write_at(self, offset: int, parts: Sequence[memoryview]) -> None:
        with naming_file(self._name):
            for part in parts:
                data = part[: self._left]
                self._left -= len(data)
                self._writer.write(data)

    def __enter__(self) -> _SequentialTarget:
        self._writer.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with naming_file(self._name):
            self._writer.__exit__(kind, error, trace)


class _WindowJob(NamedTuple):
    """Windows of one file that one thread makes and writes in this order."""

    target: PositionedWriter
    file: FileWindows
    numbers: range


def _jobs(targets: Sequence[PositionedWriter], files: Sequence[FileWindows]) -> list[_WindowJob]:
    """Return a job per window, or one per file where the file is written from front to back."""
    jobs = []
    for target, file in zip(targets, files, strict=True):
        step = max(1, file.count) if isinstance(target, _SequentialTarget) else 1
        for at in range(0, file.count, step):
            jobs.append(_WindowJob(target, file, range(at, min(at + step, file.count))))
    return jobs


def write_windows(
    targets: Sequence[PositionedWriter],
    files: Sequence[FileWindows],
    *,
    threads: int,
    progress: Progress | None = None,
    on_made: Callable[[], None] | None = None,
) -> None:
    """Make all windows of some files, and write each at once.

    Args:
        targets: from `open_targets`.
        files: the windows of each target.
        threads: number of threads that make and write windows, each with a buffer of its own.
        progress: receives the number of bytes written.
        on_made: called when no payload is read any more, unless some are written in place.

    Raises:
        OSError: from the store. All threads stop then.
    """
    total = sum(file.layout.nbytes for file in files)
    meter, unmade = ProgressMeter(progress, "write", total), _UnmadeWindows(files, on_made)
    buffer_bytes = max((file.max_bytes for file in files), default=0)

    def write(jobs: Iterator[_WindowJob]) -> None:
        buffer = allocate_pages(buffer_bytes)
        for target, file, numbers in jobs:
            for number in numbers:
                low, high = file.span(number)
                parts = file.make(number, buffer)
                unmade.count_down()
                target.write_at(low, parts)
                meter.add(high - low)

    def worker(jobs: Iterator[_WindowJob]) -> None:
        try:
            write(jobs)
        except BaseException as error:
            # Otherwise other threads would wait for ever for a window of this one.
            for file in files:
                file.fail(error)
            raise

    parallel(_jobs(targets, files), worker, threads)


class _UnmadeWindows:
    """Counts the windows that are still to be made, and makes a call when there are none."""

    def __init__(self, files: Sequence[FileWindows], then: Callable[[], None] | None) -> None:
        self._count, self._then = sum(file.count for file in files), then
        self._lock = Lock()
        if not self._count and then is not None:
            then()

    def count_down(self) -> None:
        with self._lock:
            self._count -= 1
            last = not self._count
        if last and self._then is not None:
            self._then()


def write_plain_file(
    store: Store,
    name: str,
    rows: I64,
    nbytes: I64,
    payloads: Payloads,
    *,
    max_window_bytes: int,
    checksums: bool,
) -> FileWindows:
    """Write a file that consists of payloads alone, in the given order and without gaps.

    The calling thread makes and writes all windows. The file is durable on return, but its name is
    only after `store.sync()`. After an error it is removed.

    Args:
        store: where the file is created.
        name: name of the file, which must not exist.
        rows: [N] rows of `payloads` in the order of the file.
        nbytes: [N] bytes of each payload.
        payloads: the bytes. Without `checksums` each is copied once, from its first byte to its
            last, one payload after the other.
        max_window_bytes: size limit of a window, and of the memory that it takes.
        checksums: compute the checksums of all blocks. All payloads must have an address then.

    Returns:
        The windows, which know the offset and the checksums of each payload.

    Raises:
        OSError: from the store, naming the file, or from the payloads.
    """
    zeros = np.zeros(len(rows), np.int64)
    file = FileWindows(
        name,
        lay_out(nbytes, zeros, [None], zeros, max_window_bytes),
        payloads,
        rows,
        nbytes,
        {} if checksums else dict.fromkeys(range(len(rows)), 0),
        payloads.addresses[rows] if checksums else zeros,
        in_place=False,
    )
    with naming_file(name), open_targets(store, [file]) as targets:
        write_windows(targets, [file], threads=1)
    return file
