"""Threads that work on the jobs of one call, and have ended when it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from threading import Lock, Thread
from typing import Generic, TypeVar

from shardkeep.types import Progress

__all__ = ["ProgressMeter", "parallel"]

T = TypeVar("T")


class _Jobs(Generic[T]):
    """Gives jobs to threads, in order, until one fails."""

    def __init__(self, jobs: Sequence[T]) -> None:
        self._jobs = iter(jobs)
        self._lock = Lock()
        self._stopped = False
        self.errors: list[BaseException] = []

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._lock:
            if self._stopped:
                raise StopIteration
            return next(self._jobs)

    def fail(self, error: BaseException) -> None:
        with self._lock:
            self._stopped = True
            self.errors.append(error)


def parallel(jobs: Sequence[T], worker: Callable[[Iterator[T]], None], threads: int) -> None:
    """Run `worker` in several threads, the calling one included, until all jobs are done.

    After the first error, no worker gets another job. All threads have ended when this returns or
    raises that error, even if one cannot be started or Ctrl-C is pressed meanwhile.

    Args:
        jobs: the jobs, in the order in which they are given out.
        worker: does the jobs of an iterator, which all workers share.
        threads: number of threads.
    """
    shared = _Jobs(jobs)

    def guarded() -> None:
        try:
            worker(shared)
        except BaseException as error:
            shared.fail(error)

    helpers = [
        Thread(target=guarded, name=f"shardkeep-io-{n}", daemon=True)
        for n in range(min(threads, len(jobs)) - 1)
    ]
    try:
        for helper in helpers:
            helper.start()
        guarded()
    except BaseException as error:
        shared.fail(error)
    finally:
        # An interrupted call of `start` may have started its thread.
        _join([helper for helper in helpers if helper.ident is not None], shared)
    if shared.errors:
        raise shared.errors[0]


def _join(threads: list[Thread], jobs: _Jobs[T]) -> None:
    """Wait for all threads; after Ctrl-C, they stop at the end of their present job."""
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt as interrupt:
                jobs.fail(interrupt)


class ProgressMeter:
    """Adds up the progress of several threads, and reports it."""

    def __init__(self, progress: Progress | None, phase: str, total: int) -> None:
        self._progress, self._phase, self._total = progress, phase, total
        self._lock = Lock()
        self._done = 0

    def add(self, nbytes: int) -> None:
        if self._progress is None:
            return
        with self._lock:
            self._done += nbytes
            done = self._done
        self._progress(self._phase, done, self._total)
