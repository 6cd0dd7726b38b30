"""The manager of a run: saves its steps, restores the newest readable one, deletes old ones.

Looking at a run needs no torch. Saving and restoring import it when they are called.
"""

from __future__ import annotations

import importlib
import signal
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, SupportsFloat, get_args

from typing_extensions import Unpack

from shardkeep.checkpoint.metrics import finite
from shardkeep.coordination import detect_ranks
from shardkeep.coordination.contract import Ranks
from shardkeep.coordination.events import EventSender, guarded
from shardkeep.engine.load_options import LoadConfig, LoadOptions
from shardkeep.engine.options import AsyncSaveOptions, SaveConfig
from shardkeep.engine.save_queue import queue_key
from shardkeep.errors import NotACheckpoint, ShardkeepError
from shardkeep.run import StepNames, Steps
from shardkeep.run.agreement import Outcome, SaveProposal, agree_on_save
from shardkeep.run.entered import EnteredRanks
from shardkeep.run.policies import KeepPolicy, Mode
from shardkeep.run.pruner import Pruner
from shardkeep.run.signals import Signals
from shardkeep.run.step_handle import StepHandle
from shardkeep.stores.contract import Store
from shardkeep.util.without_torch import needs_torch

if TYPE_CHECKING:
    from shardkeep.engine.reports import SaveReport
    from shardkeep.run.restore import Restored

__all__ = ["Manager", "StepHandle"]

WhenBusy = Literal["wait", "skip"]
OnError = Literal["raise", "warn"]


class Manager:
    """Saves and restores the steps of a run, each in a folder of its own, and deletes old steps.

    Every rank creates a manager and calls `should_save`, `save` and `restore` for the same steps in
    the same order. A single process may call `latest`, `steps`, `best`, `metrics`, `path`, `store`
    and `prune` on its own; these need no torch.

    Args:
        root: the folder of the run, which is created if needed, or a store.
        keep: the policy that says which steps to keep, such as `KeepLast(3) | KeepEvery(10_000)`.
            The other steps are deleted in the background once a newer step is durable. None keeps
            all steps.
        every: `should_save` returns True at the multiples of this number.
        name: the names of the step folders. They contain `{step}`, or `{step:08}` to pad the number
            with zeros.
        asynchronous: True lets `save` return when the state is copied; False when it is durable.
        when_busy: what `save` does while the previous save is still under way on some rank: "wait"
            for it, or "skip" this save. All ranks do the same.
        on_error: what the next call does after a save has failed: "raise" the error, or "warn" of
            it and go on.
        ranks: the global ranks that take part. The default is all ranks of the default process
            group, or this process alone if there is none.
        options: the options that every save uses. They are those of `async_save`:

            - `flatten`: True stores nested containers leaf by leaf; False stores each top-level
              value as one object. Default True.
            - `files`: the number of data files that each rank writes at most.
            - `balance_replicas`: distribute replicated tensors over the ranks that hold them.
              Default True.
            - `require_identical_objects`: refuse objects that differ between ranks. Default True.
            - `max_host_memory`: bytes of host memory that a save may use.
            - `retries`: how often a rank writes its copy of the state again if storage fails with
              an `OSError`; the other ranks wait for it. Default 0.
            - `low_priority`: write with the lowest scheduling priority. Default False.
            - `progress`: a callback for progress, or True for a progress bar.
            - `on_event`: a hook that receives the events of saves, restores and deletions.

    Raises:
        ValueError: an argument has a value that is not listed above.
        TypeError: an argument has the wrong type, or is unknown.

    Example:
        >>> with shardkeep.Manager("run", keep=shardkeep.KeepLast(3), every=100) as run:
        ...     first = run.restore(state, default=-1) + 1
        ...     for step in range(first, 10_000):
        ...         train(step)
        ...         if run.should_save(step):
        ...             run.save(step, state, metrics={"loss": loss})
    """

    def __init__(
        self,
        root: str | PathLike[str] | Store,
        *,
        keep: KeepPolicy | None = None,
        every: int | None = None,
        name: str = "step_{step}",
        asynchronous: bool = True,
        when_busy: WhenBusy = "wait",
        on_error: OnError = "raise",
        ranks: Sequence[int] | Ranks | None = None,
        **options: Unpack[AsyncSaveOptions],
    ) -> None:
        _check_choice("when_busy", when_busy, get_args(WhenBusy))
        _check_choice("on_error", on_error, get_args(OnError))
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1, not {every}")
        config = SaveConfig.of("Manager", AsyncSaveOptions, options)
        # Guarded once: an exception of the hook is logged once for all saves.
        self._config = replace(config, on_event=guarded(config.on_event))
        self._steps = Steps(root, StepNames(name))
        self._job = detect_ranks(ranks)
        self._keep, self._every, self._asynchronous = keep, every, asynchronous
        self._when_busy, self._raises = when_busy, on_error == "raise"
        self._queue_key = queue_key(ranks)
        self._pruner = Pruner(self._steps, keep, self._events())
        self._last_save: StepHandle | None = None
        self._unreadable: dict[int, str] = {}
        """Steps that a restore could not read, and why."""
        self._stop_agreement = self._job.stop_agreement(self._url)
        self._stops = False
        self._signals = Signals(self.request_save)
        self._restored: Restored | None = None

    def __repr__(self) -> str:
        every = "" if self._every is None else f", every {self._every} steps"
        keep = "all steps" if self._keep is None else repr(self._keep)
        rank = f"rank {self._job.rank} of {self._job.size}"
        return f"<Manager: {self._url}, {rank}{every}, keeps {keep}>"

    @property
    def _url(self) -> str:
        return self._steps.root.url

    def _events(self, step: int | None = None) -> EventSender:
        """Return the sender of events of the run, or of one of its steps."""
        return EventSender(self._config.on_event, path=self._url, rank=self._job.rank, step=step)

    # --- looking ---------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Return the committed steps in ascending order. The storage is read at every call.

        Example:
            >>> run.steps()
            [100, 200, 300]
        """
        return self._steps.numbers()

    def latest(self) -> int | None:
        """Return the newest committed step, or None if there is none.

        Whether its data is intact is checked when it is loaded or verified.
        """
        return self._steps.latest()

    def best(self, metric: str, mode: Mode = "min") -> int | None:
        """Return the step with the best value of a metric, or None if no step has the metric.

        Args:
            metric: the name of the metric, as it was passed to `save`.
            mode: "min" if lower values are better, "max" if higher values are. Of several steps
                with the same value, the newest is the best.

        Raises:
            ValueError: `mode` is neither "min" nor "max".

        Example:
            >>> shardkeep.load(state, run.path(run.best("loss")))
        """
        return self._steps.best(metric, mode)

    def metrics(self, step: int) -> Mapping[str, float]:
        """Return the metrics that were saved with a step; empty if there are none."""
        return self._steps.metrics(step)

    def path(self, step: int) -> str:
        """Return the path of a step, whether it exists or not: for `open`, `load` and the command.

        Example:
            >>> checkpoint = shardkeep.open(run.path(100))
        """
        return self._steps.store(step).url

    def store(self, step: int) -> Store:
        """Return the folder of a step as a store, which `open` and `load` also accept."""
        return self._steps.store(step)

    @property
    def restored(self) -> Restored | None:
        """What the last `restore` did: the step, the load report, the steps it could not read."""
        return self._restored

    # --- saving ----------------------------------------------------------------------------------

    def should_save(self, step: int) -> bool:
        """Return whether to save this step: a multiple of `every`, or requested by a rank.

        Every rank calls this once after each step.

        Args:
            step: the step that has just been trained.

        Raises:
            RankFailed: another rank requested a save, and a rank does not answer.
        """
        return self._agree_to_stop(step) or (self._every is not None and step % self._every == 0)

    def save(
        self,
        step: int,
        state: Mapping[Any, Any],
        metrics: Mapping[str, SupportsFloat] | None = None,
        *,
        overwrite: bool = False,
    ) -> StepHandle:
        """Save a state as a step. Every rank calls this with its own state.

        Args:
            step: the number of the step, 0 or more.
            state: nested mappings and lists of tensors and values. Objects with `state_dict` and
                `load_state_dict`, such as modules and optimizers, are saved by their state.
            metrics: numbers by name, which are committed with the step and which `best` and
                `KeepBest` compare. Those of the coordinator (rank 0) are saved. A number that is
                not finite is left out with a warning.
            overwrite: replace the step if it exists. A step that `restore` found unreadable is
                always replaced.

        Returns:
            A handle. Its `result` waits until the step is durable.

        Raises:
            AlreadyExists: the step exists, and `overwrite` is False.
            Conflict: the state contradicts itself, or the ranks save different steps.
            ShardkeepError, OSError: the previous save failed, and `StepHandle.result` has not been
                called for it: then this save is not begun. Or this save failed before the state was
                copied. With `on_error="warn"`, only the handle raises the error.
            ModuleNotFoundError: torch is not installed.

        Example:
            >>> handle = run.save(100, {"model": model, "optim": optimizer}, {"loss": 0.25})
            >>> handle.result().nbytes
            1473052672
        """
        needs_torch("shardkeep.Manager.save")
        stops = self._agree_to_stop(step)
        if self._last_save is not None and (stops or self._when_busy == "wait"):
            self._last_save.unreported_error()
        with EnteredRanks(self._job, "save", self._url, events=self._events(step)) as ranks:
            ranks.entered.phase("agree")
            numbers = _finite_metrics(metrics) if ranks.rank == 0 else {}
            decision = agree_on_save(ranks.entered, self._proposal(step))
            if not decision.skip and not decision.stop:
                if self._last_save is not None:
                    self._report_failure(self._last_save)
                self._last_save = self._start_save(step, state, numbers, overwrite, ranks)
                return self._last_save
            ranks.entered.conclude()
        if decision.skip:
            return StepHandle.skipping(step)
        self._raise_failure(decision.previous)

    def _proposal(self, step: int) -> SaveProposal:
        """Return what this rank knows before it saves a step."""
        last, error = self._last_save, None
        busy = last is not None and not last.done()
        if last is not None and not busy:
            error = last.unreported_error()
        return SaveProposal(step, busy, self._raises, error)

    def _start_save(
        self,
        step: int,
        state: Mapping[Any, Any],
        metrics: Mapping[str, float],
        overwrite: bool,
        ranks: EnteredRanks,
    ) -> StepHandle:
        from shardkeep.engine.async_save import start_save

        def ended(report: SaveReport | None) -> None:
            self._pruner.end()
            if report is not None:
                self._unreadable.pop(step, None)
                if self._job.rank == 0:
                    self._pruner.prune_later(step, frozenset(self._unreadable))

        replaces = overwrite or step in self._unreadable
        config = replace(self._config, overwrite=replaces, metrics=metrics, step=step)
        store, key, behind = self._steps.store(step), self._queue_key, self._asynchronous
        self._pruner.begin(step)
        try:
            future = start_save(
                lambda: state,
                store,
                ranks,
                config,
                key=key,
                on_end=ended,
                asynchronous=behind,
            )
        except Exception as error:
            if self._raises:
                raise
            ranks.fail(error)
            handle = StepHandle.failing(step, error)
            self._report_failure(handle)
            return handle
        return StepHandle(step, future)

    def _report_failure(self, save: StepHandle) -> None:
        """Raise the error of a save that has ended, or warn of it, unless the caller knows of it.

        Raises:
            The error of the save, if `on_error` is "raise".
        """
        error = save.unreported_error()
        if error is None:
            return
        save.mark_reported()
        if self._raises:
            raise error
        message = f"step {save.step} was not saved: {type(error).__name__}: {error}"
        warnings.warn(f"{self._url}: {message}", stacklevel=3)

    def _raise_failure(self, previous: Outcome) -> NoReturn:
        """Raise why the previous save failed on this rank, or else on the rank that failed first.

        All ranks raise at the same call, whether or not they know of a failure of their own.
        """
        save = self._last_save
        assert save is not None  # it has failed
        error = save.unreported_error()
        save.mark_reported()
        raise error or previous.rank_failed("save", self.path(save.step))

    # --- stopping --------------------------------------------------------------------------------

    def request_save(self) -> None:
        """Request a save at the next step that all ranks can agree on.

        `should_save` then returns True at that step, on all ranks. Any rank may call this at any
        time. It only sets a flag, so it is safe in a signal handler.

        Raises:
            ShardkeepError: the job has no key-value store through which the ranks could agree.
        """
        if self._stop_agreement is None:
            raise ShardkeepError(
                "the ranks of this job cannot agree on a step to save: its process group has no "
                "key-value store"
            )
        self._stop_agreement.request()

    def save_on_signal(self, *numbers: int) -> None:
        """Request a save when a signal arrives on any rank.

        The previous handler of the signal is called as well, and is put back by `close`. If the
        signal had no handler, its default action, such as to end the process, does not happen:
        leave the training loop when `preempted` is True.

        Args:
            numbers: the signals; SIGTERM by default.

        Raises:
            ValueError: this is not the main thread.
            ShardkeepError: the job has no key-value store through which the ranks could agree.

        Example:
            >>> run.save_on_signal(signal.SIGTERM, signal.SIGUSR1)
            >>> for step in range(first, last):
            ...     train(step)
            ...     if run.should_save(step):
            ...         run.save(step, state)
            ...     if run.preempted:
            ...         break
        """
        if self._stop_agreement is None:
            self.request_save()
        for number in numbers or (signal.SIGTERM,):
            self._signals.install(number)

    @property
    def preempted(self) -> bool:
        """Whether the ranks agreed to stop after the last step: save it, then leave the loop."""
        return self._stops

    def _agree_to_stop(self, step: int) -> bool:
        if self._stop_agreement is not None:
            self._stops = self._stop_agreement.stops_at(step)
        return self._stops

    # --- ending ----------------------------------------------------------------------------------

    def wait(self) -> None:
        """Wait until the last save is durable and the steps that it made superfluous are deleted.

        Raises:
            ShardkeepError, OSError: the save failed, and the caller does not know of it yet. With
                `on_error="warn"`, this is a warning.
        """
        try:
            if self._last_save is not None:
                self._last_save.unreported_error()
                self._report_failure(self._last_save)
        finally:
            self._pruner.finish()

    def close(self) -> None:
        """Wait for the last save, put signal handlers back, and leave the other ranks.

        A `with` block calls this. If the block ends with an exception, a failed save is only a
        warning.

        Raises:
            ShardkeepError, OSError: the last save failed, and the caller does not know of it yet.
        """
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
            self._raises = False  # The error of a save must not hide the one of the block.
        self.close()

    # --- restoring -------------------------------------------------------------------------------

    def restore(
        self,
        state: MutableMapping[Any, Any],
        *,
        step: int | None = None,
        default: int | None = None,
        **options: Unpack[LoadOptions],
    ) -> int:
        """Fill a state from the newest readable step. Every rank calls this.

        If a step cannot be read, or does not match its checksums, the one before it is tried, with
        a warning; `restored` lists the steps that were passed over. An error in the template is
        raised at once.

        A damaged step may have filled a part of the state before the damage was found. The step
        that is restored instead must fill all of that again. If it does not, because `strict`
        allows names to be missing or `per_rank` skips values, it is refused: no state ever mixes
        two steps. After any error the state may hold parts of a step, so do not continue with it.

        Args:
            state: the template. Tensors are filled in place, and other values are replaced.
            step: restore this step and no other.
            default: returned if no step is committed.
            options: how to load:

                - `strict`: whether a name that the step lacks is an error; also per name pattern.
                - `dtype`: "error", "cast" or "upcast" where the stored dtype differs; also per name
                  pattern.
                - `trust`: classes, as "module.Class", that objects may contain.
                - `per_rank`: "error", "skip", "modulo" or a function, for `PerRank` values of
                  another number of ranks; also per name pattern.
                - `verify`: check the checksums of everything that is read. Default True.
                - `max_host_memory`: bytes of host memory that the reading may use.
                - `progress`: a callback for progress, or True for a progress bar.
                - `on_event`: a hook for the events; the default is that of the manager.

        Returns:
            The step that was restored.

        Raises:
            NotACheckpoint: no step is committed, and there is no `default`.
            Damaged: no step can be read.
            Mismatch: the template does not match the step, or the step lacks names that an
                unreadable step may have filled: restore it by its number, into a new state.
            Untrusted: an object holds a class that was not trusted.
            RankFailed: another rank failed.
            ModuleNotFoundError: torch is not installed.

        Example:
            >>> first = run.restore({"model": model, "optim": optimizer}, default=-1) + 1
        """
        needs_torch("shardkeep.Manager.restore")
        from shardkeep.run.restore import restore

        _import_saving()
        if self._last_save is not None:
            self._last_save.unreported_error()
        self._pruner.finish()
        config = LoadConfig.of("Manager.restore", {"on_event": self._config.on_event, **options})
        found = restore(self._steps, self._job, state, step, config)
        if found is None:
            if default is not None:
                return default
            raise NotACheckpoint(f"{self._url}: no step is committed there")
        self._restored = found
        self._unreadable |= found.passed_over
        for number, reason in found.passed_over.items():
            message = f"step {number} cannot be read, so step {found.step} is restored: {reason}"
            warnings.warn(f"{self._url}: {message}", stacklevel=2)
        return found.step

    def prune(self) -> tuple[int, ...]:
        """Delete the steps that the `keep` policy does not include, and return their numbers.

        `save` does this in the background. The newest readable step is never deleted, and a step
        that cannot be read stays, with a warning. Only the coordinator (rank 0) deletes steps; the
        other ranks return an empty tuple.

        Raises:
            OSError: a step could not be deleted. All others that had to be deleted are gone.

        Example:
            >>> shardkeep.Manager("run", keep=shardkeep.KeepLast(2)).prune()
            (100, 200)
        """
        self._pruner.finish()
        return self._pruner.prune(frozenset(self._unreadable)) if self._job.rank == 0 else ()


def _import_saving() -> None:
    """Import what a save needs, which takes a second that the first save should not take."""
    with suppress(ImportError):  # Without torch, a run can only be looked at.
        importlib.import_module("shardkeep.engine.async_save")


def _finite_metrics(metrics: Mapping[str, SupportsFloat] | None) -> Mapping[str, float]:
    """Return the metrics that are saved, and warn of those that are left out."""
    numbers, omitted = finite(metrics or {})
    if omitted:
        names = ", ".join(map(repr, omitted))
        warnings.warn(f"metrics that are not finite are left out: {names}", stacklevel=3)
    return numbers


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")
