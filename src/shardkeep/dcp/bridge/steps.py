"""A save and a load in the steps that torch documents, for planners and storage of the user's own.

Plans travel pickled, as in torch, but over the job's key-value store: no collective is called, and
what fails on any rank in a step is raised on all of them.
"""

from __future__ import annotations

import inspect
import pickle
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from torch.distributed.checkpoint.logger import _dcp_method_logger
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from shardkeep.contracts import Ranks, Session
from shardkeep.errors import NotACheckpoint

__all__ = ["load_by_steps", "save_by_steps"]

T = TypeVar("T")


def save_by_steps(
    state: Any,
    writer: StorageWriter,
    planner: SavePlanner,
    job: Ranks,
    *,
    use_collectives: bool = True,
) -> Metadata:
    """Save by the planner's plans with the writer's writes.

    The order of calls, on every rank unless it says otherwise: `planner.set_up_planner`,
    `writer.set_up_storage_writer`, `planner.create_local_plan`, `writer.prepare_local_plan`; on the
    coordinator `planner.create_global_plan`, `writer.prepare_global_plan`; `planner.finish_plan`,
    `writer.write_data`; on the coordinator `writer.finish`. Without `use_collectives` each rank is
    its own coordinator.

    Raises:
        CheckpointException: a step failed; on every rank, with what each rank raised.
        RankFailed: a rank is gone.
    """
    metadata: Any = None
    log = _logger(writer)

    @log
    def plan_local() -> Any:
        _set_up_planner(planner, state, writer, lead)
        rank: dict[str, Any] = {"rank": session.rank, "use_collectives": use_collectives}
        set_up = writer.set_up_storage_writer
        set_up(lead, **(rank if _takes(set_up, "kwargs") else {}))
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
        return metadata

    def all_alone() -> Metadata:
        return finish([write(plan_global([plan_local()])[0])])

    with _Steps(job.session("save", _where(writer))) as steps:
        session, lead = steps.session, steps.session.rank == 0
        if not use_collectives:
            return steps.each("write", all_alone)
        plan = steps.scatter("plan", plan_local, plan_global)
        return steps.share("write", lambda: write(plan), finish)


def load_by_steps(state: Any, reader: StorageReader, planner: LoadPlanner, job: Ranks) -> None:
    """Load by the planner's plans with the reader's reads.

    The order of calls, on every rank unless it says otherwise: `reader.read_metadata`,
    `planner.set_up_planner`, `reader.set_up_storage_reader`, `planner.create_local_plan`,
    `reader.prepare_local_plan`; on the coordinator `planner.create_global_plan`,
    `reader.prepare_global_plan`; `planner.finish_plan`, `reader.read_data`. Where ranks have saved
    without collectives, each one plans for itself.

    Raises: as `save_by_steps`.
    """
    alone = False
    log = _logger(reader)

    @log
    def plan_local() -> Any:
        nonlocal alone
        metadata, alone = _metadata(reader, session.rank)
        planner.set_up_planner(state, metadata, session.rank == 0)
        rank: dict[str, Any] = {"rank": session.rank, "use_collectives": not alone}
        set_up = reader.set_up_storage_reader
        set_up(metadata, session.rank == 0, **(rank if _takes(set_up, "kwargs") else {}))
        return reader.prepare_local_plan(planner.create_local_plan())

    @log
    def plan_global(plans: list[Any]) -> list[Any]:
        if alone:
            return [reader.prepare_global_plan(planner.create_global_plan([p]))[0] for p in plans]
        return reader.prepare_global_plan(planner.create_global_plan(plans))

    @log
    def read(plan: Any) -> None:
        reader.read_data(planner.finish_plan(plan), planner).wait()

    with _Steps(job.session("load", _where(reader))) as steps:
        session = steps.session
        plan = steps.scatter("plan", plan_local, plan_global)
        steps.each("read", lambda: read(plan))


class _Steps:
    """Steps that all ranks take: what any of them raises in one is raised on all of them.

    A context manager around the session. What all ranks have agreed to raise does not end the
    session as a failure of one of them: the others would hear of that in place of what failed.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
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
        ended = (None, None, None) if error is self._agreed else (kind, error, trace)
        self.session.__exit__(*ended)

    def scatter(
        self, phase: str, local: Callable[[], T], combine: Callable[[list[T]], Sequence[T]]
    ) -> T:
        """This rank's part of what `combine`, on the coordinator, makes of what `local` gives."""
        answers = self._gather(phase, local)
        messages = answers and self._combine(answers, lambda values: [*map(_done, combine(values))])
        return self._take(phase, self.session.scatter(messages))

    def share(self, phase: str, local: Callable[[], Any], combine: Callable[[list[Any]], T]) -> T:
        """What `combine`, on the coordinator, makes for all ranks of what `local` gives on each."""
        answers = self._gather(phase, local)
        messages = answers and self._combine(answers, lambda values: [_done(combine(values))])
        return self._take(phase, self.session.broadcast(messages[0] if messages else None))

    def each(self, phase: str, local: Callable[[], T]) -> T:
        """What `local` gives on this rank, when it has come to its end on all."""
        kept: list[T] = []
        self.share(phase, lambda: kept.append(local()), lambda _: None)
        return kept[0]

    def _gather(self, phase: str, local: Callable[[], Any]) -> list[bytes] | None:
        self.session.phase(phase)
        try:
            message = _done(local())
        except (Exception, CheckpointException) as error:
            message = _failed({self.session.rank: _wrap_exception(error)})
        return self.session.gather(message)

    def _combine(
        self, answers: list[bytes], combine: Callable[[list[Any]], list[bytes]]
    ) -> list[bytes]:
        values, failures = [], {}
        for answer in answers:
            value, failed = pickle.loads(answer)  # noqa: S301 - from a rank of this job
            values.append(value)
            failures.update(failed)
        if not failures:
            try:
                return combine(values)
            except (Exception, CheckpointException) as error:
                failures = {self.session.rank: _wrap_exception(error)}
        return [_failed(failures)] * self.session.size

    def _take(self, phase: str, message: bytes) -> Any:
        value, failures = pickle.loads(message)  # noqa: S301 - from the coordinator of this job
        if failures:
            self._agreed = CheckpointException(phase, failures)
            raise self._agreed
        return value


def _done(value: Any) -> bytes:
    return pickle.dumps((value, {}))


def _failed(failures: dict[int, Any]) -> bytes:
    """The failures, with text in place of exceptions that can't travel."""
    try:
        message = pickle.dumps((None, failures))
        pickle.loads(message)  # noqa: S301 - what was just made
    except Exception:
        told = {
            rank: (RuntimeError(f"{type(error).__name__}: {error}"), trace)
            for rank, (error, trace) in failures.items()
        }
        return pickle.dumps((None, told))
    return message


def _where(storage: Any) -> str:
    """What the ranks call this work: storage may have no id, or not one that is text."""
    return str(getattr(storage, "checkpoint_id", None) or type(storage).__qualname__)


def _takes(function: Callable[..., Any], parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


def _set_up_planner(planner: Any, state: Any, writer: StorageWriter, lead: bool) -> None:
    meta = writer.storage_meta()
    if _takes(planner.set_up_planner, "storage_meta"):
        planner.set_up_planner(state_dict=state, storage_meta=meta, is_coordinator=lead)
        return
    warnings.warn(
        f"{type(planner).__qualname__}.set_up_planner takes no storage_meta: planners written for "
        "torch 2.3 and older go on working, but add the parameter",
        stacklevel=2,
    )
    planner.set_up_planner(state, lead)


def _metadata(reader: StorageReader, rank: int) -> tuple[Metadata, bool]:
    """The checkpoint's metadata, and whether it is this rank's own."""
    try:
        return reader.read_metadata(), False
    except Exception:
        if not _takes(reader.read_metadata, "kwargs"):
            raise
        try:
            return reader.read_metadata(rank=rank), True
        except NotACheckpoint:
            pass  # What the first try says is about the checkpoint; this is about one file.
        raise


def _logger(storage: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Torch's hook around each step: `torch.distributed.checkpoint.logger`."""
    place = getattr(storage, "checkpoint_id", None)
    return _dcp_method_logger(**({} if place is None else {"checkpoint_id": place}))
