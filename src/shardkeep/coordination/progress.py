"""Progress of saves and loads: a bar on standard error, the caller's callback, and events."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from shardkeep.coordination.contract import Session
from shardkeep.coordination.events import Event, EventHook, EventSender, ProgressMade, guarded
from shardkeep.types import Progress

__all__ = ["as_event_hook", "bar", "shown"]


def _silent(phase: str, done: int, total: int) -> None:
    """Do nothing."""


@contextmanager
def bar(*, show: bool = True) -> Iterator[Progress]:
    """Show a bar on a terminal until the work is done.

    It disappears then, so that only results stay on the screen.

    Args:
        show: False shows nothing.
    """
    if not show or not sys.stderr.isatty():
        yield _silent
        return
    # Imported here because that takes as long as listing a small checkpoint.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True)
    rates = TransferSpeedColumn(), TimeRemainingColumn()
    with Bars(*columns, *rates, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None, visible=False)  # until the total is known

        def show_done(phase: str, done: int, total: int) -> None:
            bars.update(task, description=phase, completed=done, total=total, visible=True)

        yield show_done


def as_event_hook(progress: Progress) -> EventHook:
    """Return a hook that calls a progress callback for each `ProgressMade` event."""

    def consume(event: Event) -> None:
        if isinstance(event, ProgressMade):
            progress(event.phase, event.done_nbytes, event.total_nbytes)

    return consume


@contextmanager
def shown(
    progress: Progress | bool | None, session: Session, send: EventSender | None = None
) -> Iterator[Progress]:
    """Report the progress of a save or a load, as its caller wants it.

    Every call of the yielded function is one `ProgressMade` event, which the bar, the caller's
    callback and the caller's event hook consume. An exception of one of these is logged once and
    ignored, so that it can't lose a save.

    A call also raises `RankFailed` if another rank has failed meanwhile, so that a rank with much
    to do does not go on for minutes.

    Args:
        progress: the caller's callback; True shows a bar on rank 0, if there is a terminal.
        session: the session of the work.
        send: passes the events on to the caller's event hook.
    """
    showing: AbstractContextManager[Progress]
    if isinstance(progress, bool):
        showing = bar(show=progress and session.rank == 0)
    else:
        showing = nullcontext(progress or _silent)
    with showing as callback:
        show = guarded(as_event_hook(callback), "progress", callback)

        def report(phase: str, done: int, total: int) -> None:
            session.check()
            event = ProgressMade(phase=phase, done_nbytes=done, total_nbytes=total)
            show(event)
            if send is not None:
                send(event)

        yield report
