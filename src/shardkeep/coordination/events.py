"""Events: what saves, loads and runs report while they work, one frozen dataclass each.

Every event is written to the log (`logging.getLogger("shardkeep")`) and passed to the hook that the
caller gave as `on_event=`. The text of an event, `str(event)`, is its log line.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from shardkeep.types import Progress
from shardkeep.util.formatting import count, human_bytes

__all__ = [
    "CheckpointLoaded",
    "Event",
    "EventHook",
    "EventSender",
    "FilesWritten",
    "ProgressMade",
    "ReplacedFilesRemoved",
    "Retried",
    "SaveBegan",
    "SaveCommitted",
    "StateStaged",
    "StepPassedOver",
    "StepRemoved",
    "StepRestored",
    "WaitingForRanks",
    "Work",
    "WorkFailed",
    "guarded",
]

_log = logging.getLogger("shardkeep")

_MAX_RANKS_SHOWN = 8

Work = Literal["save", "load", "restore", "remove"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a checkpoint. Each kind of event is a subclass.

    Attributes:
        path: where the checkpoint is, or the run.
        rank: the rank that reports the event, counted among those that take part; the coordinator
            is rank 0.
        step: the training step, if a `Manager` does the work; otherwise None.

    Example:
        >>> def record(event: shardkeep.Event) -> None:
        ...     if isinstance(event, shardkeep.SaveCommitted) and event.rank == 0:
        ...         metrics.log({"checkpoint_seconds": event.seconds}, step=event.step)
        >>> run = shardkeep.Manager("run", on_event=record)
    """

    log_level: ClassVar[int] = logging.DEBUG
    """The level of the log line."""
    coordinator_only: ClassVar[bool] = False
    """Whether ranks other than the coordinator log it at DEBUG: all of them report the same."""

    path: str = ""
    rank: int = 0
    step: int | None = None

    @property
    def subject(self) -> str:
        """The step and the path, as the log line names them."""
        return self.path if self.step is None else f"step {self.step} ({self.path})"


EventHook = Callable[[Event], None]
"""Receives events. Called on the thread where they happen, at times on several threads at once.

It should return quickly: the save or load waits for it. If it raises an exception, that is logged
once as a warning with its traceback and otherwise ignored, so that an error in monitoring code does
not lose a checkpoint. `KeyboardInterrupt` and `SystemExit` are not ignored.
"""


# --- saving --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SaveBegan(Event):
    """A save has begun on this rank.

    Attributes:
        asynchronous: whether it goes on in the background once the state is copied.
    """

    asynchronous: bool

    def __str__(self) -> str:
        how = "asynchronously " if self.asynchronous else ""
        return f"saving {self.subject} {how}on rank {self.rank}"


@dataclass(frozen=True, kw_only=True)
class StateStaged(Event):
    """The state of this rank has been copied: the caller may change it from now on.

    Attributes:
        nbytes: bytes that were copied.
        seconds: how long the caller has been blocked.
    """

    nbytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"copied {human_bytes(self.nbytes)} of {self.subject} on rank {self.rank} "
            f"in {self.seconds:.2f} s"
        )


@dataclass(frozen=True, kw_only=True)
class FilesWritten(Event):
    """The data files of this rank are durable. The checkpoint is not committed yet.

    Attributes:
        nbytes: bytes that this rank wrote.
        seconds: how long it wrote, the wait for durability included.
    """

    nbytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"wrote {human_bytes(self.nbytes)} of {self.subject} on rank {self.rank} "
            f"in {self.seconds:.2f} s"
        )


@dataclass(frozen=True, kw_only=True)
class SaveCommitted(Event):
    """The checkpoint is durable and can be loaded.

    Attributes:
        save_id: the id of the save, which is part of the names of its files.
        tensors: how many tensors it holds.
        objects: how many objects it holds.
        nbytes: bytes of all data files, of all ranks.
        seconds_blocked: how long the caller was blocked: until the state was copied if the save is
            asynchronous, otherwise all the time.
        seconds: from the call until the checkpoint was durable.
    """

    log_level: ClassVar[int] = logging.INFO
    coordinator_only: ClassVar[bool] = True

    save_id: str
    tensors: int
    objects: int
    nbytes: int
    seconds_blocked: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"saved {self.subject}: {human_bytes(self.nbytes)}, blocked for "
            f"{self.seconds_blocked:.2f} s, durable after {self.seconds:.2f} s"
        )


@dataclass(frozen=True, kw_only=True)
class ReplacedFilesRemoved(Event):
    """The files of an overwritten checkpoint are removed; the new one is committed.

    Attributes:
        files: how many files were removed.
    """

    files: int

    def __str__(self) -> str:
        return f"removed {count(self.files, 'file')} of the checkpoint that {self.subject} replaced"


@dataclass(frozen=True, kw_only=True)
class Retried(Event):
    """Storage refused something, and this rank tries again.

    Attributes:
        attempt: the number of this retry: 1 is the first one.
        retries: how many retries there are at most.
        error: what the last attempt raised.
        seconds: how long this rank waits before it tries again.
    """

    log_level: ClassVar[int] = logging.WARNING

    attempt: int
    retries: int
    error: Exception
    seconds: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} could not write {self.subject}: {_named(self.error)}; retry "
            f"{self.attempt} of {self.retries} in {self.seconds:.1f} s"
        )


# --- loading -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CheckpointLoaded(Event):
    """A state was filled from a checkpoint.

    Attributes:
        names: how many tensors and objects of this rank's state were filled.
        nbytes: bytes of tensor data that this rank needed.
        seconds: how long the load took on this rank.
    """

    log_level: ClassVar[int] = logging.INFO
    coordinator_only: ClassVar[bool] = True

    names: int
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"loaded {self.subject}: {count(self.names, 'name')}, {human_bytes(self.nbytes)} on "
            f"rank {self.rank} in {self.seconds:.2f} s"
        )


@dataclass(frozen=True, kw_only=True)
class StepRestored(Event):
    """A run was restored from a step.

    Attributes:
        passed_over: newer steps that could not be read, the newest first.
        seconds: how long the restore took, with all attempts.
    """

    log_level: ClassVar[int] = logging.INFO
    coordinator_only: ClassVar[bool] = True

    passed_over: tuple[int, ...]
    seconds: float

    def __str__(self) -> str:
        skipped = ", ".join(map(str, self.passed_over))
        after = f"; passed over unreadable steps: {skipped}" if skipped else ""
        return f"restored {self.subject} in {self.seconds:.2f} s{after}"


@dataclass(frozen=True, kw_only=True)
class StepPassedOver(Event):
    """A restore could not read a step, and tries the one before it.

    Attributes:
        reason: the error of the rank that could not read it.
    """

    log_level: ClassVar[int] = logging.WARNING
    coordinator_only: ClassVar[bool] = True

    reason: str

    def __str__(self) -> str:
        return f"cannot read {self.subject}, trying an older step: {self.reason}"


# --- a run ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StepRemoved(Event):
    """A step was deleted, because no keep policy keeps it. Only the coordinator deletes steps."""

    log_level: ClassVar[int] = logging.INFO

    def __str__(self) -> str:
        return f"deleted {self.subject}: the keep policy no longer includes it"


# --- any work ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WorkFailed(Event):
    """A save, load, restore or removal failed on this rank.

    Attributes:
        work: which kind of work it was.
        error: the exception. A failure of another rank is a `RankFailed` that names it.
    """

    log_level: ClassVar[int] = logging.WARNING

    work: Work
    error: BaseException

    def __str__(self) -> str:
        return f"the {self.work} of {self.subject} failed on rank {self.rank}: {_named(self.error)}"


@dataclass(frozen=True, kw_only=True)
class WaitingForRanks(Event):
    """This rank has been waiting for others for a while.

    Attributes:
        work: what the ranks do together, such as "save".
        waiting_for: the ranks that have not come.
        phase: the phase that this rank is in.
        reason: what it waits for.
        seconds: how long it has been waiting.
    """

    log_level: ClassVar[int] = logging.WARNING

    work: str
    waiting_for: tuple[int, ...]
    phase: str
    reason: str
    seconds: float

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.waiting_for[:_MAX_RANKS_SHOWN]))
        left = len(self.waiting_for) - _MAX_RANKS_SHOWN
        others = f"rank{'' if len(self.waiting_for) == 1 else 's'} {shown}" + (
            f" and {left} more" if left > 0 else ""
        )
        return (
            f"rank {self.rank} has been waiting for {others} for {self.seconds:.0f} s in phase "
            f"{self.phase!r} of the {self.work} of {self.subject}: {self.reason}"
        )


@dataclass(frozen=True, kw_only=True)
class ProgressMade(Event):
    """A phase of a save or a load has come further on this rank. Not logged.

    Attributes:
        phase: the phase, such as "write" or "read".
        done_nbytes: bytes that are done.
        total_nbytes: bytes of the whole phase.
    """

    log_level: ClassVar[int] = logging.NOTSET

    phase: str
    done_nbytes: int
    total_nbytes: int

    def __str__(self) -> str:
        done, total = human_bytes(self.done_nbytes), human_bytes(self.total_nbytes)
        return f"{self.phase} of {self.subject} on rank {self.rank}: {done} of {total}"


# --- sending -------------------------------------------------------------------------------------


class _GuardedHook:
    """A hook whose exceptions are logged, the first one only, and ignored."""

    def __init__(self, hook: EventHook, argument: str, callback: object) -> None:
        self._hook, self._argument, self._callback = hook, argument, callback
        self._warned = False

    def __call__(self, event: Event) -> None:
        try:
            self._hook(event)
        except Exception:
            if not self._warned:
                self._warned = True
                _log.warning(
                    "%s=%r raised an exception for %r, which is ignored, and so are later "
                    "exceptions of it",
                    self._argument,
                    self._callback,
                    event,
                    exc_info=True,
                )


def _ignore(event: Event) -> None:
    """Do nothing: there is no hook."""


def guarded(
    hook: EventHook | None, argument: str = "on_event", callback: object = None
) -> EventHook:
    """Return a hook that never raises an exception.

    Args:
        hook: the caller's hook, None, or one that this function returned before, which is returned
            as it is. A `Manager` guards its hook once, so that all its saves log one exception.
        argument: the name of the argument that the hook was passed as, for the log.
        callback: what the caller passed as that argument; by default the hook itself.
    """
    if hook is None or isinstance(hook, _GuardedHook):
        return hook or _ignore
    return _GuardedHook(hook, argument, callback or hook)


class EventSender:
    """Logs the events of one save, load or run, and passes them to the caller's hook.

    Args:
        hook: the caller's hook, guarded or not.
        path: the path of all events that do not have one.
        rank: the rank of all events.
        step: the step of all events that do not have one.

    Example:
        >>> send = EventSender(on_event, path=store.url, rank=session.rank)
        >>> send(FilesWritten(nbytes=written, seconds=1.5))
    """

    def __init__(
        self, hook: EventHook | None, *, path: str, rank: int, step: int | None = None
    ) -> None:
        self._hook = guarded(hook)
        self._path, self._rank, self._step = path, rank, step

    def __call__(self, event: Event) -> None:
        """Complete an event by path, rank and step, log it, and call the hook."""
        step = self._step if event.step is None else event.step
        event = replace(event, path=event.path or self._path, rank=self._rank, step=step)
        level = event.log_level
        if event.coordinator_only and self._rank:
            level = logging.DEBUG
        if level and _log.isEnabledFor(level):
            _log.log(level, "%s", event)
        self._hook(event)

    def progress(self) -> Progress:
        """Return a function that sends `ProgressMade` events: what reading and writing call."""

        def made(phase: str, done: int, total: int) -> None:
            self(ProgressMade(phase=phase, done_nbytes=done, total_nbytes=total))

        return made


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
