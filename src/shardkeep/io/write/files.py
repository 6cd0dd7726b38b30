"""Images into files: several threads, each with a buffer of its own; one pass over the data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from types import TracebackType
from typing import NamedTuple

import numpy as np

from shardkeep import settings
from shardkeep.io.arena import aligned
from shardkeep.io.pool import Meter, parallel
from shardkeep.io.write.windows import FileWindows
from shardkeep.plan.file_layout import MIN_WINDOW_BYTES
from shardkeep.settings import PAGE
from shardkeep.stores.abilities import PositionedWriter, SupportsPositionedWrites
from shardkeep.stores.contract import Store, Writer
from shardkeep.types import Progress

__all__ = ["WriterSettings", "choose_writers", "copy_threads", "open_targets", "write_windows"]

_WRITE = 16 << 20
"""Bytes of one write at most: a busy interpreter delays a thread once for each."""


class WriterSettings(NamedTuple):
    """How files are written: by so many threads, in windows of at most so many bytes."""

    threads: int
    window: int


def choose_writers(ranks_here: int, budget: int, *, beside: bool = False) -> WriterSettings:
    """What is fastest for so many ranks of one machine, within a budget of bytes for each.

    As measured on 2 cores: 2 threads in one process, 1 in each of 4 (docs/decisions, "How bytes are
    written").

    Args:
        beside: the caller goes on meanwhile. Then it is one thread: those that come back from the
            kernel to the interpreter hold the caller up, and each other.
    """
    most = 1 if beside else 4
    threads = settings.write_threads() or _clamp(settings.cores() // ranks_here, 1, most)
    threads = _clamp(budget // MIN_WINDOW_BYTES, 1, threads)
    share = budget // threads // PAGE * PAGE
    return WriterSettings(threads, _clamp(share, MIN_WINDOW_BYTES, _WRITE))


def copy_threads(ranks_here: int) -> int:
    """Threads that fill the memory's bandwidth, together with those of the other ranks here."""
    return _clamp(settings.cores() // ranks_here, 1, 8)


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))


@contextlib.contextmanager
def open_targets(store: Store, images: Sequence[FileWindows]) -> Iterator[list[PositionedWriter]]:
    """New files for the images, with their space reserved; durable when the block is left.

    `store.sync()`, for the names of the files, is the caller's. After an error none is left.

    Raises:
        OSError: from the store, naming the file.
    """
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_target(store, image)) for image in images]


def _target(store: Store, image: FileWindows) -> PositionedWriter:
    if store.hints.positioned_writes and isinstance(store, SupportsPositionedWrites):
        return store.open_positioned_writer(image.name, image.layout.nbytes)
    return _InOrder(store.open_writer(image.name), image.layout.nbytes)


class _InOrder(PositionedWriter):
    """A file of a store that writes front to back only."""

    def __init__(self, sink: Writer, nbytes: int) -> None:
        self._sink, self._left = sink, nbytes

    def write_at(self, offset: int, parts: Sequence[memoryview]) -> None:
        for part in parts:
            data = part[: self._left]
            self._left -= len(data)
            self._sink.write(data)

    def __enter__(self) -> _InOrder:
        self._sink.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._sink.__exit__(kind, error, trace)


class _Job(NamedTuple):
    """Windows of one file that one thread has to make and write, in this order."""

    target: PositionedWriter
    image: FileWindows
    windows: range


def _jobs(targets: Sequence[PositionedWriter], images: Sequence[FileWindows]) -> list[_Job]:
    """A job for each window of a file; one for all of them where it is written in order."""
    jobs = []
    for target, image in zip(targets, images, strict=True):
        count = image.windows
        step = max(1, count) if isinstance(target, _InOrder) else 1
        jobs += [
            _Job(target, image, range(at, min(at + step, count))) for at in range(0, count, step)
        ]
    return jobs


def write_windows(
    targets: Sequence[PositionedWriter],
    images: Sequence[FileWindows],
    *,
    threads: int,
    progress: Progress | None = None,
    made: Callable[[], None] | None = None,
) -> None:
    """Make all windows of the images and write each at once.

    Args:
        targets: as `open_targets` gives them.
        images: what goes into them.
        threads: how many make and write windows, each in a buffer of its own.
        progress: told how many bytes of the files are written.
        made: called when the payloads are not looked at any more, if none is written from where it
            lies.

    Raises:
        OSError: from the store. Other threads stop.
    """
    total = sum(image.layout.nbytes for image in images)
    meter, left = Meter(progress, "write", total), _Left(images, made)
    biggest = max((int(np.diff(image.layout.cuts).max(initial=0)) for image in images), default=0)

    def write(mine: Iterator[_Job]) -> None:
        space = aligned(_up(biggest))
        for target, image, windows in mine:
            for number in windows:
                low, high = image.span(number)
                parts = image.make(number, space)
                left.one_less()
                target.write_at(low, parts)
                meter.add(high - low)

    def worker(mine: Iterator[_Job]) -> None:
        try:
            write(mine)
        except BaseException as error:
            # Else other threads would wait for a window that nobody makes any more.
            for image in images:
                image.fail(error)
            raise

    parallel(_jobs(targets, images), worker, threads)


class _Left:
    """Counts the windows that are still to be made."""

    def __init__(self, images: Sequence[FileWindows], then: Callable[[], None] | None) -> None:
        self._count, self._then = sum(image.windows for image in images), then
        self._lock = Lock()
        if not self._count:
            self._count = 1
            self.one_less()

    def one_less(self) -> None:
        with self._lock:
            self._count -= 1
            last = not self._count
        if last and self._then is not None:
            self._then()


def _up(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE
