"""Saves that go on in the background, out of memory that is kept between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from os import PathLike
from typing import Any, TypeVar

from shardkeep.coordination import detect_ranks
from shardkeep.coordination.contract import Ranks
from shardkeep.engine.save import Options, SaveReport, life
from shardkeep.engine.save_queue import Behind, Handle, Job, Turns, line_of, simulated
from shardkeep.io.arena import Arena
from shardkeep.stores import store_at
from shardkeep.stores.contract import Store
from shardkeep.types import Progress
from shardkeep.util.forking import after_fork_in_child

__all__ = ["SaveHandle", "async_save", "in_background", "release_memory"]

T = TypeVar("T")


def async_save(
    state: Mapping[Any, Any],
    path: str | PathLike[str] | Store,
    *,
    overwrite: bool = False,
    flatten: bool = True,
    files: int | None = None,
    balance_replicas: bool = True,
    require_identical_objects: bool = True,
    max_host_memory: int | None = None,
    low_priority: bool = False,
    ranks: Sequence[int] | Ranks | None = None,
    progress: Progress | bool | None = None,
) -> SaveHandle:
    """Save a state as it is now, while the caller goes on; otherwise as `save`.

    It returns when what this rank writes has been copied; what changes after that does not change
    what is saved. The copy lies in memory that is kept for the next save; `release_memory` gives it
    back. Saves of one process are made one after another: a call waits for the one before. Until
    somebody waits for it, a save leaves the interpreter to others after each millisecond of work.

    Args:
        max_host_memory: bytes of memory that the copy and the buffers may take. With less than a
            rank's
            part of the state, the call returns later: when the last bytes have been taken. By
            default the whole part is copied, whatever its size.
        low_priority: write at the lowest priority, so that training hardly notices.
        state, path, overwrite, flatten, files, balance_replicas, require_identical_objects, ranks,
            progress: as of `save`.

    Raises: what `save` raises before anything is written. What fails later, `SaveHandle.result`
        raises; if nobody asks for it, the next save does.
    """
    options = Options(
        overwrite,
        flatten,
        files,
        balance_replicas,
        require_identical_objects,
        None,
        max_host_memory,
        progress,
        low_priority,
    )
    job, store, rank = detect_ranks(ranks), store_at(path), simulated(ranks)
    line = line_of(rank)
    line.finish()
    return SaveHandle(begin([line.owed(state)], store, job, options, rank))


def begin(
    given: list[Mapping[Any, Any]],
    store: Store,
    job: Ranks,
    options: Options,
    rank: int | None = None,
    ended: Callable[[SaveReport | None], None] = lambda _: None,
    *,
    behind: bool = True,
) -> Future[Any]:
    """Begin a save; returns when the state is copied. The future gives its `SaveReport`.

    Args:
        given, store, job, options: as of `life`.
        rank: as of `in_background`.
        ended: called on the thread that saves, with the report once the checkpoint is committed, or
            None once it has failed.
        behind: False makes the whole save before it returns; without a copy, if it is tried once.

    Raises: what `life` raises before that.
    """

    def save(needs: Behind | None) -> SaveReport:
        report = None
        try:
            report = life(given, store, job, options, needs)
        finally:
            ended(report)
        return report

    if not behind and not options.retries:
        line_of(rank).finish()
        now: Future[Any] = Future()
        now.set_result(save(None))
        return now
    staged, future = in_background(save, store.url, rank)
    if not staged.done() or not behind:
        future.result()
    return future


def in_background(
    save: Callable[[Behind], T], path: str, rank: int | None = None
) -> tuple[Future[None], Future[T]]:
    """Begin a save on a thread of its own, as soon as the one before is done.

    Args:
        save: given what it needs for that.
        path: where it saves to.
        rank: which one it is of those that are simulated in this process.

    Returns:
        When the state is staged: what was to be set (if it was), and what the save returns or
        raises. Neither can be cancelled: other ranks would wait for this one.
    """
    line = line_of(rank)
    line.finish()  # Its memory is used again.
    arena = _arenas.setdefault(rank, Arena())
    staged: Future[None] = Future()

    def in_a_thread() -> T:
        return _in_a_thread(lambda: save(Behind(arena, staged, Turns(lambda: outcome.awaited))))

    work = Job(in_a_thread, owed=True, path=path)
    outcome = work.future
    try:
        line.put(work)
        wait([staged, work.future], return_when=FIRST_COMPLETED)
    except BaseException:
        # A Ctrl-C: the caller may change now what was not copied so far, so it must not be saved.
        work.owed = not staged.cancel()
        raise
    return staged, work.future


class SaveHandle(Handle[SaveReport]):
    """A save that goes on in the background."""


_arenas: dict[int | None, Arena] = {}
"""What async saves are staged in: one for this process, and for each rank simulated in it."""

_of_the_parent: list[Arena] = []


def _forget() -> None:
    """In a forked process: a save of its parent's may be using that memory, and pinned memory is
    not even there. It is not given back either, which is for who pinned it.
    """
    _of_the_parent.extend(_arenas.values())
    _arenas.clear()


after_fork_in_child(_forget)


def release_memory() -> None:
    """Give back the memory that async saves keep, when those under way are done."""
    for rank, arena in list(_arenas.items()):
        line_of(rank).finish()
        arena.release()


def _in_a_thread(work: Callable[[], T]) -> T:
    """Do it in a thread of its own, whose priority may be changed for good."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="shardkeep-save", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors.pop()  # Kept here, it would hold itself, and what it had open.
    return results.pop()
