"""Restoring a run: from the newest step that can be read, or from the step before it."""

from __future__ import annotations

import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardkeep.coordination.contract import Ranks, Session
from shardkeep.coordination.events import (
    EventSender,
    StepPassedOver,
    StepRestored,
    WorkFailed,
)
from shardkeep.engine.load import run_load
from shardkeep.engine.load_options import LoadConfig
from shardkeep.engine.load_report import LoadReport
from shardkeep.errors import Damaged, FormatError, Mismatch, NotACheckpoint, RankFailed
from shardkeep.format.messages import columns
from shardkeep.run import Steps
from shardkeep.run.agreement import Severity, worst_outcome
from shardkeep.run.partial_fills import PartialFills
from shardkeep.stores import open_store

__all__ = ["Restored", "restore"]

_UNREADABLE = (Damaged, FormatError, NotACheckpoint, OSError)
"""Errors for which an older step is tried."""

_MAX_NAMES_SHOWN = 20


@dataclass(frozen=True, slots=True, repr=False)
class Restored:
    """What `Manager.restore` did: the value of `Manager.restored`.

    Attributes:
        step: the step that the state was filled from.
        report: the report of its load.
        passed_over: newer steps that could not be read -> why; the newest first.

    Example:
        >>> run.restore(state)
        200
        >>> run.restored
        <Restored: step 200, passed over 300>
    """

    step: int
    report: LoadReport
    passed_over: Mapping[int, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        skipped = ", ".join(map(str, self.passed_over))
        return f"<Restored: step {self.step}" + (f", passed over {skipped}>" if skipped else ">")


def restore(
    steps: Steps,
    ranks: Ranks,
    state: MutableMapping[Any, Any],
    step: int | None,
    config: LoadConfig,
) -> Restored | None:
    """Fill a state from the newest readable step, or from one step; None if none is committed.

    Args:
        steps: the steps of the run.
        ranks: the ranks that take part.
        state: the template.
        step: restore this step and no other.
        config: how to load; its hook receives the events.

    Raises: what `Manager.restore` raises.
    """
    url, began = steps.root.url, time.perf_counter()
    events = EventSender(config.on_event, path=url, rank=ranks.rank)
    try:
        with ranks.session("restore", url, events=events) as session:
            attempts = _Attempts(session, steps, ranks, state, config)
            restored = attempts.only(step) if step is not None else attempts.newest_readable()
    except Exception as error:
        events(WorkFailed(work="restore", error=error, step=step))
        raise
    if restored is not None:
        path, seconds = steps.store(restored.step).url, time.perf_counter() - began
        passed_over = tuple(restored.passed_over)
        events(
            StepRestored(path=path, step=restored.step, passed_over=passed_over, seconds=seconds)
        )
    return restored


class _Attempts:
    """The attempts of one rank to restore steps, and their common session."""

    def __init__(
        self,
        session: Session,
        steps: Steps,
        ranks: Ranks,
        state: MutableMapping[Any, Any],
        config: LoadConfig,
    ) -> None:
        self._session, self._steps, self._ranks = session, steps, ranks
        self._state, self._config = state, config
        self._partial_fills = PartialFills(session.rank, session.size)

    def only(self, step: int) -> Restored:
        """Restore this step and no other."""
        error, report = self._load(step)
        severity = Severity.SUCCESS if error is None else _severity(error)
        outcome = worst_outcome(self._session, severity, error)
        if report is None or outcome.severity is not Severity.SUCCESS:
            raise error or outcome.rank_failed("load", self._steps.store(step).url)
        self._session.conclude()
        return Restored(step, report)

    def newest_readable(self) -> Restored | None:
        """Restore the newest step that all ranks can read; None if no step is committed."""
        passed_over: dict[int, str] = {}
        for step in self._newest_first():
            found = self._attempt(step)
            if not isinstance(found, str):
                return Restored(step, found, passed_over)
            passed_over[step] = found
        if passed_over:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in passed_over.items())
            raise Damaged(f"none of its steps can be read: {reasons}", file=self._steps.root.url)
        return None

    def _newest_first(self) -> Sequence[int]:
        """Return the committed steps that the coordinator sees."""
        message = None
        if self._session.rank == 0:
            message = columns.pack({"steps": self._steps.numbers()[::-1]}, {})
        found, _ = columns.unpack(self._session.broadcast(message))
        numbers: list[int] = found["steps"]
        return numbers

    def _attempt(self, step: int) -> LoadReport | str:
        """Load a step on all ranks, and return the report, or why some rank could not read it.

        Raises:
            Mismatch: something in the state may come from a step that could not be read.
        """
        store = self._steps.store(step)
        error, report = self._load(step)
        if report is not None:
            error = self._mixed(store.url, report)
        severity = Severity.SUCCESS if error is None else _severity(error)
        outcome = worst_outcome(self._session, severity, error)
        if report is not None and outcome.severity is Severity.SUCCESS:
            self._session.conclude()
            return report
        if outcome.severity is not Severity.UNREADABLE:
            raise error or outcome.rank_failed("load", store.url)
        self._partial_fills.add(step, store, error)
        events = EventSender(
            self._config.on_event, path=store.url, rank=self._session.rank, step=step
        )
        events(StepPassedOver(reason=outcome.error))
        return outcome.error

    def _load(self, step: int) -> tuple[Exception | None, LoadReport | None]:
        """Load a step, and return the error of this rank or the report."""
        try:
            store = open_store(self._steps.store(step), budget=self._config.max_host_memory)
            return None, run_load(self._state, store, self._ranks, self._config, step)
        except Exception as error:
            return error, None

    def _mixed(self, path: str, report: LoadReport) -> Mismatch | None:
        """Return an error if something in the state may come from a step that could not be read."""
        remaining = self._partial_fills.remaining(report.missing, report.skipped)
        if not remaining:
            return None
        names = ", ".join(map(repr, list(remaining)[:_MAX_NAMES_SHOWN]))
        left = len(remaining) - _MAX_NAMES_SHOWN
        more = f" and {left} more" if left > 0 else ""
        tried = ", ".join(f"step {step}" for step in sorted({*remaining.values()}, reverse=True))
        return Mismatch(
            f"{path} does not have {names}{more}, which {tried} may have filled before it turned "
            "out to be unreadable: the state would mix several steps. Create a new state, and "
            "restore a step by its number",
            report,
        )


def _severity(error: Exception) -> Severity:
    if isinstance(error, RankFailed):
        return Severity.OTHER_RANK
    return Severity.UNREADABLE if isinstance(error, _UNREADABLE) else Severity.FATAL
