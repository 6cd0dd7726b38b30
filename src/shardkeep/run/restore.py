"""The life of a restore: the newest step of a run that is whole, or the one before it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardkeep.coordination.contract import Ranks, Session
from shardkeep.engine.load import LoadReport, load
from shardkeep.errors import Damaged, FormatError, Mismatch, NotACheckpoint, RankFailed
from shardkeep.format.messages import columns
from shardkeep.run import Steps
from shardkeep.run.agreement import Severity, worst_outcome
from shardkeep.run.partial_fills import PartialFills

__all__ = ["Restored", "restore"]

_UNREADABLE = (Damaged, FormatError, NotACheckpoint, OSError)
"""What an older step may help against."""

_SHOWN = 20
"""Names in a message at most."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did.

    Attributes:
        step: where the state is from.
        report: what loading it did.
        passed_over: newer steps that could not be read, and why; the newest first.
    """

    step: int
    report: LoadReport
    passed_over: Mapping[int, str] = field(default_factory=dict)


def restore(
    steps: Steps,
    job: Ranks,
    state: MutableMapping[Any, Any],
    step: int | None,
    how: Mapping[str, Any],
) -> Restored | None:
    """Fill a state from the newest step that is whole, or from the one that is asked for.

    Args:
        steps: those of the run.
        job: who takes part.
        state, how: the template and other arguments, as of `load`.
        step: this one and no other.

    Returns:
        None if nothing is committed.

    Raises: as `Manager.restore`.
    """
    url = steps.root.url
    with job.session("restore", url) as session:
        numbers = [step] if step is not None else _newest_first(session, steps)
        traces = PartialFills(session.rank, session.size) if step is None else None
        passed_over: dict[int, str] = {}
        for number in numbers:
            found = _tried(session, steps, job, number, state, how, traces)
            if not isinstance(found, str):
                return Restored(number, found, passed_over)
            passed_over[number] = found
        if passed_over:
            why = "; ".join(f"step {number}: {text}" for number, text in passed_over.items())
            raise Damaged(f"none of its steps can be read: {why}", file=url)
        return None


def _newest_first(session: Session, steps: Steps) -> Sequence[int]:
    """The committed steps, as the coordinator sees them."""
    word = None if session.rank else columns.pack({"steps": steps.numbers()[::-1]}, {})
    found, _ = columns.unpack(session.broadcast(word))
    numbers: list[int] = found["steps"]
    return numbers


def _tried(
    session: Session,
    steps: Steps,
    job: Ranks,
    step: int,
    state: MutableMapping[Any, Any],
    how: Mapping[str, Any],
    traces: PartialFills | None,
) -> LoadReport | str:
    """Load a step; why it can't be read on some rank, unless there is no other to try.

    Args:
        traces: what the tries before may have left in the state, to which a failed one is added;
            None if there is no other to try.
    """
    store = steps.store(step)
    severity, error, report = Severity.SUCCESS, None, None
    try:
        report = load(state, store, ranks=job, **how)
        if traces is not None:
            _refuse_mixed(store.url, report, traces)
    except Exception as caught:
        severity, error = _severity_of(caught), caught
    outcome = worst_outcome(session, severity, error)
    if report is not None and outcome.severity is Severity.SUCCESS:
        session.conclude()
        return report
    if outcome.severity is Severity.UNREADABLE and traces is not None:
        traces.add(step, store, error)
        return outcome.error
    raise error or outcome.rank_failed("load", store.url)


def _severity_of(error: Exception) -> Severity:
    if isinstance(error, RankFailed):
        return Severity.OTHER_RANK
    return Severity.UNREADABLE if isinstance(error, _UNREADABLE) else Severity.FATAL


def _refuse_mixed(path: str, report: LoadReport, traces: PartialFills) -> None:
    """Raise Mismatch if something in the state may be of a step that could not be read."""
    left = traces.left(report.missing, report.skipped)
    if not left:
        return
    names = ", ".join(map(repr, list(left)[:_SHOWN]))
    more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    tried = ", ".join(f"step {step}" for step in sorted({*left.values()}, reverse=True))
    raise Mismatch(
        f"{path} does not have {names}{more}, which {tried} may have filled before that turned out "
        "to be unreadable: the state would be of more than one step; make it anew, and restore a "
        "step by its number",
        report,
    )
