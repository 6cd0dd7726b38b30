"""A progress bar on standard error, where that is a terminal: always asked for, never by itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from shardkeep.coordination.contract import Session
from shardkeep.types import Progress

__all__ = ["bar", "shown"]


def _silent(phase: str, done: int, total: int) -> None:
    """Shows nothing."""


@contextmanager
def bar(*, show: bool = True) -> Iterator[Progress]:
    """A bar that is gone when the work is done, so that only results stay on the screen."""
    if not show or not sys.stderr.isatty():
        yield _silent
        return
    # Only here: importing them takes as long as listing a small checkpoint.
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
        task = bars.add_task("", total=None, visible=False)  # until something is known

        def show_done(phase: str, done: int, total: int) -> None:
            bars.update(task, description=phase, completed=done, total=total, visible=True)

        yield show_done


@contextmanager
def shown(progress: Progress | bool | None, session: Session) -> Iterator[Progress]:
    """What a caller of `save` or `load` asks for: True is a bar, on the first rank alone.

    Whoever tells it of progress hears, by `RankFailed`, of other ranks that have failed meanwhile:
    a rank that has much to do does not go on for minutes before it asks.
    """
    showing: AbstractContextManager[Progress]
    if isinstance(progress, bool):
        showing = bar(show=progress and session.rank == 0)
    else:
        showing = nullcontext(progress or _silent)
    with showing as tell:

        def told(phase: str, done: int, total: int) -> None:
            session.check()
            tell(phase, done, total)

        yield told
