"""The checkpoints of a run: saved step by step, restored from the newest whole one, kept few.

What looks at steps needs no torch; saving and restoring import it when they are called.
"""

from __future__ import annotations

import importlib
import signal
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, SupportsFloat

from shardkeep.checkpoint.metrics import finite
from shardkeep.coordination import detect_ranks
from shardkeep.coordination.contract import Ranks
from shardkeep.engine.save_queue import Handle, simulated
from shardkeep.errors import NotACheckpoint, ShardkeepError
from shardkeep.run import StepNames, Steps
from shardkeep.run.agreement import Outcome, SaveProposal, agree_on_save
from shardkeep.run.entered import EnteredRanks
from shardkeep.run.policies import KeepPolicy, Mode
from shardkeep.run.pruner import Pruner
from shardkeep.run.signals import Signals
from shardkeep.stores.contract import Store
from shardkeep.types import Progress
from shardkeep.util.without_torch import needs_torch

if TYPE_CHECKING:
    from shardkeep.engine.save import SaveReport
    from shardkeep.run.restore import Restored

__all__ = ["Manager", "StepHandle"]


class StepHandle(Handle["SaveReport | None"]):
    """A save of a manager. Its `result` is None if it was left out.

    Attributes:
        step: what is saved.
        skipped: whether it was left out, as the save before was still under way.
    """

    def __init__(self, step: int, future: Future[SaveReport | None], skipped: bool = False) -> None:
        super().__init__(future)
        self.step, self.skipped = step, skipped
        self.told = False
        """Whether its failure, if it has one, has been raised or warned of."""

    def result(self, timeout: float | None = None) -> SaveReport | None:
        try:
            return super().result(timeout)
        finally:
            self.told = self.done()

    def failure(self) -> BaseException | None:
        """Waits until it has ended; what nobody has been told of yet."""
        error = self._future.exception()
        return None if self.told else error


class Manager:
    """Saves, restores and keeps the steps of a run, each in a folder of its own.

    Every rank makes one and calls `should_save`, `save` and `restore` for the same steps in the
    same order. What only looks (`latest`, `steps`, `best`, `metrics`, `path`) any process may call
    alone, and so it may `prune`; also without torch.

    Args:
        root: the folder of the run (made if needed), or a store.
        keep: which steps stay, such as `KeepLast(3) | KeepEvery(10_000)`; None keeps all. The rest
            is deleted in the background once a newer step is durable.
        every: `should_save` is true at the multiples of this.
        name: the folders' names, with `{step}` or, say, `{step:08}` in it.
        asynchronous: `save` returns when the state is copied; otherwise when it is durable.
        when_busy: what a save does while the one before is still under way: "wait" for it, or
            "skip" this one. The ranks agree on it.
        on_error: what a save that failed does to the next call: "raise", or "warn". A number
            raises, too, but before that a rank writes its copy of the state so many times anew, if
            storage fails (`OSError`); the other ranks wait for it.
        max_host_memory, low_priority, progress: as of `async_save`.
        ranks: global ranks that take part (default: all of the default group, or this process).

    Raises:
        ValueError: an argument is none of those above.
    """

    def __init__(
        self,
        root: str | PathLike[str] | Store,
        *,
        keep: KeepPolicy | None = None,
        every: int | None = None,
        name: str = "step_{step}",
        asynchronous: bool = True,
        when_busy: Literal["wait", "skip"] = "wait",
        on_error: Literal["raise", "warn"] | int = "raise",
        max_host_memory: int | None = None,
        low_priority: bool = False,
        progress: Progress | bool | None = None,
        ranks: Sequence[int] | Ranks | None = None,
    ) -> None:
        _one_of("when_busy", when_busy, ("wait", "skip"))
        retries = on_error if type(on_error) is int and on_error >= 0 else 0
        if on_error != retries:
            _one_of("on_error", on_error, ("raise", "warn"))
        if every is not None and every < 1:
            raise ValueError(f"every={every} steps can't be: 1 or more")
        self._steps = Steps(root, StepNames(name))
        self._job = detect_ranks(ranks)
        self._every, self._asynchronous = every, asynchronous
        self._when_busy, self._raises = when_busy, on_error != "warn"
        self._rank = simulated(ranks)
        self._how: dict[str, Any] = {
            "max_host_memory": max_host_memory,
            "low_priority": low_priority,
            "progress": progress,
            "retries": retries,
        }
        self._keeper = Pruner(self._steps, keep)
        self._flight: StepHandle | None = None
        self._passed_over: dict[int, str] = {}
        self._stop_agreement = self._job.stop_agreement(self._url)
        self._stops = False
        self._signals = Signals(self.request_save)
        self._restored: Restored | None = None

    # --- looking ---------------------------------------------------------------------------------

    @property
    def _url(self) -> str:
        return self._steps.root.url

    def steps(self) -> list[int]:
        """The committed steps, ascending: always looked up."""
        return self._steps.numbers()

    def latest(self) -> int | None:
        """The newest committed step; None if there is none. Reading tells whether it is whole."""
        return self._steps.latest()

    def best(self, metric: str, mode: Mode = "min") -> int | None:
        """The step with the best value of a metric, of equal ones the later; None without any.

        Args:
            mode: "min" if less is better, or "max".
        """
        return self._steps.best(metric, mode)

    def metrics(self, step: int) -> Mapping[str, float]:
        """What was saved as the metrics of a step; empty if nothing was."""
        return self._steps.metrics(step)

    def path(self, step: int) -> str:
        """Where a step is, or would be: for `open`, `load` and the command."""
        return self._steps.store(step).url

    def store(self, step: int) -> Store:
        """The same as a store, which `open` and `load` take, too."""
        return self._steps.store(step)

    @property
    def restored(self) -> Restored | None:
        """What the last `restore` did."""
        return self._restored

    # --- saving ----------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._steps.root.url}>"

    def should_save(self, step: int) -> bool:
        """Whether this step is to be saved: as `every` says, or as a rank has asked for it.

        Every rank asks at each step, when it is done with it. Raises as `save`.
        """
        return self._arrive(step) or (self._every is not None and step % self._every == 0)

    def save(
        self,
        step: int,
        state: Mapping[Any, Any],
        metrics: Mapping[str, SupportsFloat] | None = None,
        *,
        overwrite: bool = False,
    ) -> StepHandle:
        """Save a state as a step.

        Args:
            step: its number, 0 or more.
            state: as of `shardkeep.save`.
            metrics: finite numbers by name, which become part of the commit. The coordinator's
                are saved; one that is not finite is left out, with a warning.
            overwrite: replace the step if it is there already. One that `restore` has found
                unreadable is replaced in any case.

        Returns:
            A handle, whose `result` waits until the step is durable.

        Raises:
            AlreadyExists: the step is committed, and `overwrite` is False.
            Conflict: as of `shardkeep.save`, or ranks save different steps.
            ShardkeepError, OSError: the save before has failed, and `result` has not told yet: then
                this one is not begun. Or this one failed before the state was copied. Not with
                `on_error="warn"`: then the handle's `result` raises it.
        """
        needs_torch("shardkeep.Manager.save")
        stops = self._arrive(step)
        if self._flight is not None and (stops or self._when_busy == "wait"):
            self._flight.failure()
        with EnteredRanks(self._job, "save", self._url) as job:
            job.entered.phase("agree")
            numbers = _checked(metrics) if job.rank == 0 else {}
            decision = agree_on_save(job.entered, self._proposal(step))
            if not decision.skip and not decision.stop:
                self._warn_of_failure()
                self._keeper.begin(step)
                self._flight = self._begun(step, state, numbers, overwrite, job)
                return self._flight
            job.entered.conclude()
        if decision.skip:
            return StepHandle(step, _done(None), skipped=True)
        self._raise_failure(decision.previous)

    def request_save(self) -> None:
        """Ask for a save at the next step that all ranks can agree on: `should_save` is true there.

        Any rank may ask, at any time: it does no more than set a flag, so it is safe in a signal
        handler.

        Raises:
            ShardkeepError: the ranks have no way to agree, as the job has no key-value store.
        """
        if self._stop_agreement is None:
            raise ShardkeepError("this job has no key-value store: its ranks can't agree on a step")
        self._stop_agreement.request()

    def save_on_signal(self, *numbers: int) -> None:
        """Ask for a save when a signal arrives, SIGTERM by default; on one rank or on all.

        What handled it before is called, too, and handles it again after `close`. Its default
        action, such as to end the process, is off: leave the loop when `preempted` says so.

        Raises:
            ValueError: this is not the main thread.
            ShardkeepError: as of `request_save`.
        """
        if self._stop_agreement is None:
            self.request_save()
        for number in numbers or (signal.SIGTERM,):
            self._signals.install(number)

    @property
    def preempted(self) -> bool:
        """Whether the last step is the one that the ranks agreed on: save it, and stop."""
        return self._stops

    def wait(self) -> None:
        """Wait until the last save is durable, and what it made superfluous is deleted.

        Raises: why the save failed, as `save` would.
        """
        try:
            if self._flight is not None:
                self._flight.failure()
                self._tell_own(self._flight)
        finally:
            self._keeper.finish()

    def close(self) -> None:
        """`wait`, put signal handlers back, and leave: no step can be agreed on any more."""
        try:
            self.wait()
        finally:
            self._signals.restore()
            if self._stop_agreement is not None:
                self._stop_agreement.close()

    def __enter__(self) -> Manager:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._raises = False  # Not in place of what goes wrong already.
        self.close()

    def _arrive(self, step: int) -> bool:
        if self._stop_agreement is not None:
            self._stops = self._stop_agreement.stops_at(step)
        return self._stops

    def _begun(
        self,
        step: int,
        state: Mapping[Any, Any],
        metrics: Mapping[str, float],
        overwrite: bool,
        job: EnteredRanks,
    ) -> StepHandle:
        from shardkeep.engine.async_save import begin
        from shardkeep.engine.options import SaveConfig

        def ended(report: SaveReport | None) -> None:
            self._keeper.end()
            if report is not None:
                self._passed_over.pop(step, None)
                if self._job.rank == 0:
                    self._keeper.later(step, frozenset(self._passed_over))

        replaces = overwrite or step in self._passed_over
        options = SaveConfig(overwrite=replaces, metrics=metrics, **self._how)
        store, behind = self._steps.store(step), self._asynchronous
        try:
            future = begin([state], store, job, options, self._rank, ended, behind=behind)
        except Exception as error:
            if self._raises:
                raise
            job.fail(error)
            handle = StepHandle(step, _failed(error))
            self._tell_own(handle)
            return handle
        return StepHandle(step, future)

    def _proposal(self, step: int) -> SaveProposal:
        """What this rank knows before it saves `step`."""
        flight, error = self._flight, None
        busy = flight is not None and not flight.done()
        if flight is not None and not busy:
            error = flight.failure()
        return SaveProposal(step, busy, self._raises, error)

    def _raise_failure(self, previous: Outcome) -> NoReturn:
        """Raise why the previous save failed: on this rank, or on the one where it ended worst."""
        flight = self._flight
        assert flight is not None  # it failed
        error, flight.told = flight.failure(), True
        raise error or previous.rank_failed("save", self.path(flight.step))

    def _tell_own(self, flight: StepHandle) -> None:
        """Raise, or warn, of how a save that is over ended on this rank, unless that was done."""
        error = flight.failure()
        if error is None:
            return
        flight.told = True
        if self._raises:
            raise error
        what = f"step {flight.step} was not saved: {type(error).__name__}: {error}"
        warnings.warn(f"{self._url}: {what}", stacklevel=3)

    def _warn_of_failure(self) -> None:
        """Warn of the failure of the previous save on this rank, unless the caller knows of it."""
        if self._flight is not None:
            self._tell_own(self._flight)

    # --- restoring -------------------------------------------------------------------------------

    def restore(
        self,
        state: MutableMapping[Any, Any],
        *,
        step: int | None = None,
        default: int | None = None,
        **how: Any,
    ) -> int:
        """Fill a state from the newest step that is whole; every rank calls this.

        If a step can't be read, or does not match its checksums, the one before is tried, with a
        warning; `restored` tells of it. What is wrong with the template is raised at once.

        A step that turns out to be damaged may have filled a part of the state by then. The one
        that is restored fills all of that anew. Where it does not, as names are missing that
        `strict` lets be missing, or `per_rank` leaves values alone, it is refused: no state is of
        two steps. After any error the state may hold parts of a step: don't go on with it.

        Args:
            state: the template, as of `load`.
            step: this one and no other.
            default: what to return if nothing is committed.
            how: other arguments of `load`, such as `strict` and `dtype`.

        Returns:
            The step.

        Raises:
            NotACheckpoint: nothing is committed, and there is no `default`.
            Damaged: no step is whole.
            Mismatch: as of `load`; or the step lacks what one that failed may have filled: restore
                it by its number, into a state that no step has been loaded into.
            Untrusted, RankFailed: as of `load`.
        """
        needs_torch("shardkeep.Manager.restore")
        from shardkeep.run.restore import restore

        _get_ready()
        if self._flight is not None:
            self._flight.failure()
        self._keeper.finish()
        found = restore(self._steps, self._job, state, step, how)
        if found is None:
            if default is not None:
                return default
            raise NotACheckpoint(f"{self._url}: no step is committed there")
        self._restored = found
        self._passed_over |= found.passed_over
        for over, text in found.passed_over.items():
            what = f"step {over} can't be read, so step {found.step} is restored: {text}"
            warnings.warn(f"{self._url}: {what}", stacklevel=2)
        return found.step

    def prune(self) -> tuple[int, ...]:
        """Delete now what `keep` does not keep: never the newest step that is whole.

        `save` does this by itself. Only the coordinator deletes; the steps that it deleted, there.
        One that can't be read stays, with a warning.

        Raises:
            OSError: a step could not be deleted; the others that should be are gone.
        """
        self._keeper.finish()
        return self._keeper.prune(frozenset(self._passed_over)) if self._job.rank == 0 else ()


def _get_ready() -> None:
    """Import what a save needs, which takes a second, before the loop and not in its first save."""
    with suppress(ImportError):  # Without torch a run can only be looked at.
        importlib.import_module("shardkeep.engine.async_save")


def _checked(metrics: Mapping[str, SupportsFloat] | None) -> Mapping[str, float]:
    """What is saved of metrics, with a warning of what is left out."""
    numbers, left = finite(metrics or {})
    if left:
        names = ", ".join(map(repr, left))
        warnings.warn(f"metrics that are not finite are left out: {names}", stacklevel=3)
    return numbers


def _done(report: SaveReport | None) -> Future[SaveReport | None]:
    future: Future[SaveReport | None] = Future()
    future.set_result(report)
    return future


def _failed(error: Exception) -> Future[SaveReport | None]:
    future: Future[SaveReport | None] = Future()
    future.set_exception(error)
    return future


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
