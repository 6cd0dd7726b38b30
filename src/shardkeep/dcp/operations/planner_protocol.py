"""Torch's protocol of planners and storage, for planners and storage of the user's own.

Methods are called in the order that torch documents. Plans are exchanged as pickles, as in torch,
but through the job's key-value store: no collective is called, and what fails on any rank in a step
is raised on all of them.
"""

from __future__ import annotations

import inspect
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, NamedTuple, TypeVar, cast

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.logger import _dcp_method_logger
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from shardkeep.coordination.contract import Ranks, Session
from shardkeep.dcp.bridge.errors import portable, together, wrapped
from shardkeep.errors import NotACheckpoint, RankFailed

__all__ = ["load_with_planner", "save_with_planner"]

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def save_with_planner(
    state: Callable[[], Any],
    writer: StorageWriter,
    planner: SavePlanner,
    job: Ranks,
    *,
    rank: int | None = None,
    use_collectives: bool = True,
) -> Metadata:
    """Save a state with a planner and a writer; return torch's metadata.

    The order of calls, on every rank unless it says otherwise: `planner.set_up_planner`,
    `writer.set_up_storage_writer`, `planner.create_local_plan`, `writer.prepare_local_plan`; on the
    coordinator `planner.create_global_plan`, `writer.prepare_global_plan`; `planner.finish_plan`,
    `writer.write_data`; on the coordinator `writer.finish`. Without `use_collectives` each rank
    does the coordinator's part for itself, and none finishes before all have written.

    Args:
        state: returns the state. It is called inside of the session, so that its failure on one
            rank is raised on all.
        writer: writes the files.
        planner: plans the save.
        job: the ranks that save, the coordinator first.
        rank: this rank in the process group, if that numbers the ranks in another order than
            `job`. It orders the plans, and names this rank in `CheckpointException.failures`.
        use_collectives: False has each rank commit alone.

    Raises:
        CheckpointException: a step failed. Raised on every rank, with the error of each rank.
        RankFailed: a rank has ended or does not answer.
    """
    metadata: Any = None
    log = _logger(writer)

    @log
    def plan_local() -> Any:
        _set_up_planner(planner, state(), writer, lead)
        own: dict[str, Any] = {"rank": steps.rank, "use_collectives": use_collectives}
        set_up = writer.set_up_storage_writer
        set_up(lead, **(own if _takes(set_up, "kwargs") else {}))
        return writer.prepare_local_plan(planner.create_local_plan())

    @log
    def plan_global(plans: list[Any]) -> list[Any]:
        nonlocal metadata
        plans, metadata = planner.create_global_plan(plans)
        return writer.prepare_global_plan(plans)

    @log
    def write(plan: Any) -> Any:
        writes = writer.write_data(planner.finish_plan(plan), planner)
        writes.wait()
        return writes.value()

    @log
    def finish(results: list[Any]) -> Metadata:
        writer.finish(metadata=metadata, results=results)
        saved: Metadata = metadata
        return saved

    session = job.session("save", _where(writer, use_collectives))
    with _releasing(writer), _Steps(session, rank) as steps:
        lead = steps.session.rank == 0
        if not use_collectives:
            written = steps.each("write", lambda: write(plan_global([plan_local()])[0]))
            return steps.each("write", lambda: finish([written]))
        plan = steps.scatter("plan", plan_local, plan_global)
        return steps.share("write", lambda: write(plan), finish)


@contextmanager
def _releasing(writer: Any) -> Iterator[None]:
    """Release the lease of a writer of Shardkeep's when its save has ended; others have none."""
    try:
        yield
    finally:
        getattr(writer, "release_lease", lambda: None)()


def load_with_planner(
    state: Callable[[], Any],
    reader: StorageReader,
    planner: LoadPlanner,
    job: Ranks,
    *,
    rank: int | None = None,
) -> None:
    """Fill a state with a planner and a reader.

    The order of calls, on every rank unless it says otherwise: `reader.read_metadata`,
    `planner.set_up_planner`, `reader.set_up_storage_reader`, `planner.create_local_plan`,
    `reader.prepare_local_plan`; on the coordinator `planner.create_global_plan`,
    `reader.prepare_global_plan`; `planner.finish_plan`, `reader.read_data`. If the ranks have saved
    without collectives, each does the coordinator's part for itself.

    Args:
        state: returns the state to fill. It is called inside of the session, so that its failure
            on one rank is raised on all.
        reader: reads the files.
        planner: plans the load.
        job: the ranks that load, the coordinator first.
        rank: this rank in the process group, if that numbers the ranks in another order.

    Raises:
        CheckpointException: a step failed. Raised on every rank, with the error of each rank.
        RankFailed: a rank has ended or does not answer.
    """
    log = _logger(reader)

    @log
    def plan_local() -> tuple[bool, Any]:
        template = state()
        metadata, alone = _metadata(reader, steps.rank)
        lead = steps.session.rank == 0
        planner.set_up_planner(template, metadata, lead)
        own: dict[str, Any] = {"rank": steps.rank, "use_collectives": not alone}
        set_up = reader.set_up_storage_reader
        set_up(metadata, lead, **(own if _takes(set_up, "kwargs") else {}))
        plan = reader.prepare_local_plan(planner.create_local_plan())
        return alone, plan_global([plan])[0] if alone else plan

    @log
    def plan_global(plans: list[Any]) -> list[Any]:
        made: list[Any] = reader.prepare_global_plan(planner.create_global_plan(plans))
        return made

    def combine(found: list[tuple[bool, Any]]) -> list[Any]:
        plans = [plan for _, plan in found]
        if not any(alone for alone, _ in found):
            return plan_global(plans)
        if not all(alone for alone, _ in found):
            some = [number for number, (alone, _) in enumerate(found) if alone]
            raise RuntimeError(
                f"ranks {some} found only metadata that they have saved alone, the other ranks "
                "metadata of the whole job: is the checkpoint visible to all ranks?"
            )
        return plans

    @log
    def read(plan: Any) -> None:
        reader.read_data(planner.finish_plan(plan), planner).wait()

    with _Steps(job.session("load", _where(reader)), rank) as steps:
        plan = steps.scatter("plan", plan_local, combine)
        steps.each("read", lambda: read(plan))


class _Outcome(NamedTuple):
    """The result of a step on a rank.

    Attributes:
        rank: the rank.
        value: what the step returned.
        failures: errors by rank; empty if the step succeeded.
    """

    rank: int
    value: Any
    failures: dict[int, Any]


class _Steps:
    """Steps that all ranks take together: an error on any rank is raised on all of them.

    A context manager around the session. An error that all ranks have agreed to raise does not end
    the session as a failure of this rank, which the other ranks would raise in its place.
    """

    def __init__(self, session: Session, rank: int | None) -> None:
        self.session = session
        self.rank = session.rank if rank is None else rank
        self._agreed: CheckpointException | None = None

    def __enter__(self) -> _Steps:
        self.session.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or error is not self._agreed:
            self.session.__exit__(kind, error, trace)
            return
        with suppress(RankFailed):  # The agreed error says more than the end of a rank.
            self.session.__exit__(None, None, None)

    def scatter(
        self, phase: str, local: Callable[[], T], combine: Callable[[list[T]], Sequence[Any]]
    ) -> Any:
        """Combine the values of all ranks on the coordinator; return this rank's part.

        Args:
            phase: the name of the step, for errors.
            local: returns this rank's value.
            combine: called on the coordinator with the values of all ranks in the order of their
                numbers; returns one part for each rank in the same order.
        """
        outcomes = self._gather(phase, local)
        if outcomes is None:
            return self._take(phase, self._read(self.session.scatter(None)))
        done = self._combine(outcomes, combine)
        if self.session.size == 1:
            plans = self._take(phase, done)
            return plans[0]
        order = sorted(outcome.rank for outcome in outcomes)
        places = [order.index(outcome.rank) for outcome in outcomes]
        try:
            parts = [None if done.failures else done.value[place] for place in places]
            messages = [_packed(done._replace(value=part)) for part in parts]
        except Exception as error:
            messages = [_packed(self._failed(error))] * len(outcomes)
        return self._take(phase, self._read(self.session.scatter(messages)))

    def share(self, phase: str, local: Callable[[], Any], combine: Callable[[list[Any]], T]) -> T:
        """Combine the values of all ranks on the coordinator; return the result on every rank.

        Args:
            phase: the name of the step, for errors.
            local: returns this rank's value.
            combine: called on the coordinator with the values of all ranks in the order of their
                numbers.
        """
        outcomes = self._gather(phase, local)
        if outcomes is None:
            received: T = self._take(phase, self._read(self.session.broadcast(None)))
            return received
        done = self._combine(outcomes, combine)
        if self.session.size > 1:
            try:
                message = _packed(done)
            except Exception as error:
                done = self._failed(error)
                message = _packed(done)
            self.session.broadcast(message)
        made: T = self._take(phase, done)
        return made

    def each(self, phase: str, local: Callable[[], T]) -> T:
        """Return what `local` returns on this rank, once it has returned on all ranks."""
        kept: list[T] = []
        self.share(phase, lambda: kept.append(local()), lambda _: None)
        return kept[0]

    def _gather(self, phase: str, local: Callable[[], Any]) -> list[_Outcome] | None:
        """Return the outcomes of all ranks on the coordinator, None elsewhere."""
        self.session.phase(phase)
        own = self._try(local)
        if self.session.size == 1:
            return [own]  # As in torch, plans of a single process need not be picklable.
        try:
            message = _packed(own)
        except Exception as error:
            message = _packed(self._failed(error))
        answers = self.session.gather(message)
        return None if answers is None else [*map(self._read, answers)]

    def _combine(self, outcomes: list[_Outcome], combine: Callable[[list[Any]], Any]) -> _Outcome:
        failures = {rank: failure for one in outcomes for rank, failure in one.failures.items()}
        if failures:
            return _Outcome(self.rank, None, dict(sorted(failures.items())))
        values = [outcome.value for outcome in sorted(outcomes, key=lambda one: one.rank)]
        return self._try(lambda: combine(values))

    def _take(self, phase: str, outcome: _Outcome) -> Any:
        if outcome.failures:
            self._agreed = together(phase, outcome.failures)
            raise self._agreed
        return outcome.value

    def _try(self, function: Callable[[], Any]) -> _Outcome:
        try:
            return _Outcome(self.rank, function(), {})
        except (Exception, CheckpointException) as error:
            return self._failed(error)

    def _failed(self, error: BaseException) -> _Outcome:
        return _Outcome(self.rank, None, {self.rank: wrapped(error)})

    def _read(self, message: bytes) -> _Outcome:
        outcome: _Outcome = pickle.loads(message)  # noqa: S301 - from a rank of this job
        return outcome


def _packed(outcome: _Outcome) -> bytes:
    return pickle.dumps(outcome._replace(failures=portable(outcome.failures)))


def _where(storage: Any, together: bool = True) -> str:
    """Return the name of the session, which must be the same on all ranks.

    Storage of the user's own may have no id, or a different one on each rank.
    """
    place = getattr(storage, "checkpoint_id", None) if together else None
    return os.fspath(place) if isinstance(place, str | os.PathLike) else type(storage).__qualname__


def _takes(function: Callable[..., Any], parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


def _set_up_planner(planner: Any, state: Any, writer: StorageWriter, lead: bool) -> None:
    meta = writer.storage_meta()
    if _takes(planner.set_up_planner, "storage_meta"):
        planner.set_up_planner(state_dict=state, storage_meta=meta, is_coordinator=lead)
        return
    warnings.warn(
        f"{type(planner).__qualname__}.set_up_planner has no parameter storage_meta; add it: "
        "planners for torch 2.3 and older still work, but are not given the storage's metadata",
        stacklevel=2,
    )
    planner.set_up_planner(state, lead)


def _metadata(reader: StorageReader, rank: int) -> tuple[Metadata, bool]:
    """Return the checkpoint's metadata, and whether this rank has committed it alone."""
    try:
        return reader.read_metadata(), False
    except Exception as error:
        if not _takes(reader.read_metadata, "kwargs"):
            raise
        try:
            return reader.read_metadata(rank=rank), True
        except (NotACheckpoint, FileNotFoundError):
            pass  # The first error is about the checkpoint, this one about a single file.
        except Exception as own:
            if isinstance(error, NotACheckpoint | FileNotFoundError):
                raise own from None
        raise


def _logger(storage: Any) -> Callable[[F], F]:
    """Return torch's decorator that logs each step (`torch.distributed.checkpoint.logger`)."""
    place = getattr(storage, "checkpoint_id", None)
    hook = _dcp_method_logger(**({} if place is None else {"checkpoint_id": place}))
    return cast("Callable[[F], F]", hook)
