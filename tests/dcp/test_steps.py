"""A failure in any step, on any ranks, is soon raised on all of them with its cause."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from threading import Lock, Thread

import pytest

torch = pytest.importorskip("torch")

import torch.distributed.checkpoint as stock
from torch.futures import Future

import shardkeep as sk
import shardkeep.dcp as dcp
from shardkeep.coordination.keyvalue.timeouts import Timeouts
from shardkeep.dcp.operations.planner_protocol import load_with_planner, save_with_planner
from shardkeep.testing import simulated_ranks
from support import dcp_failing
from support.dcp_failing import Failing
from support.gloo import Failed
from support.scenarios import equal
from support.waiting import PROMPT_SECONDS

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
    pytest.mark.filterwarnings("ignore:.*torch.distributed is"),
]
CheckpointException = dcp.CheckpointException

SAVING = {
    "set_up_planner": "plan",
    "set_up_storage_writer": "plan",
    "create_local_plan": "plan",
    "prepare_local_plan": "plan",
    "create_global_plan": "plan",
    "prepare_global_plan": "plan",
    "finish_plan": "write",
    "resolve_data": "write",
    "write_data": "write",
    "future": "write",
    "finish": "write",
}
LOADING = {
    "read_metadata": "plan",
    "set_up_planner": "plan",
    "set_up_storage_reader": "plan",
    "create_local_plan": "plan",
    "prepare_local_plan": "plan",
    "create_global_plan": "plan",
    "prepare_global_plan": "plan",
    "finish_plan": "read",
    "load_bytes": "read",
    "resolve_tensor": "read",
    "commit_tensor": "read",
    "read_data": "read",
    "future": "read",
}
COORDINATORS = {"create_global_plan", "prepare_global_plan", "finish"}
WHO = [(0,), (2,), (1, 3), (0, 1, 2, 3)]
CASES = [
    (step, who)
    for steps in (SAVING, LOADING)
    for step in steps
    for who in WHO
    if step not in COORDINATORS or who == (0,)
]


class Ours(Exception):
    """A user's error with attributes besides its text."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text, code)
        self.code = code


class Unpicklable(Exception):
    """An error that contains a value that can't be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = Lock()


class Unreadable(Exception):
    """An error that can't be unpickled, since its arguments are not those of `__init__`."""

    def __init__(self, text: str, *, code: int) -> None:
        super().__init__(text)
        self.code = code


def state(rank: int) -> dict:
    return {"w": torch.arange(4.0), f"own{rank}": torch.tensor([rank]), f"n{rank}": rank}


def cleared(rank: int) -> dict:
    return {"w": torch.zeros(4), f"own{rank}": torch.tensor([-1]), f"n{rank}": None}


class Job:
    """Four simulated ranks with planners, readers and writers that fail on request."""

    def __init__(self, path: Path, **more: object) -> None:
        self.path, self.more = path, more
        self.failing = Failing()
        self.savers, self.loaders = [], []
        for rank in range(4):
            wrap = partial(self.failing.wrap, rank)
            self.savers.append(
                (wrap(stock.DefaultSavePlanner()), wrap(stock.FileSystemWriter(path)))
            )
            self.loaders.append(
                (wrap(stock.DefaultLoadPlanner()), wrap(stock.FileSystemReader(path)))
            )

    def save(self) -> list:
        return self._run(self._save)

    def load(self) -> list:
        return self._run(self._load)

    def _run(self, function) -> list:
        def caught(ranks):
            try:
                return function(ranks)
            except BaseException as error:
                return error

        begin = time.monotonic()
        results = simulated_ranks.run(4, caught, timeouts=Timeouts(100.0, 0.0, 5))
        assert time.monotonic() - begin < PROMPT_SECONDS
        return results

    def _save(self, ranks) -> object:
        planner, writer = self.savers[ranks.rank]
        return save_with_planner(lambda: state(ranks.rank), writer, planner, ranks, **self.more)

    def _load(self, ranks) -> object:
        planner, reader = self.loaders[ranks.rank]
        template = cleared(ranks.rank)
        load_with_planner(lambda: template, reader, planner, ranks)
        return template

    def works(self) -> None:
        assert all(isinstance(done, stock.Metadata) for done in self.save())
        self.loads()

    def loads(self) -> None:
        assert all(equal(got, state(rank)) for rank, got in enumerate(self.load()))


def failed_alike(results: list, who: tuple[int, ...], text: str, kind: type) -> None:
    for error in results:
        assert isinstance(error, CheckpointException)
        assert isinstance(error, kind)
        assert sorted(error.failures) == list(who)
        for rank, (cause, trace) in error.failures.items():
            assert type(cause) is kind
            assert str(cause) == text.format(rank=rank)
            assert any(frame.name == "fail" for frame in trace)
            assert text.format(rank=rank) in str(error)


@pytest.mark.parametrize(("step", "who"), list(dict.fromkeys(CASES)))
def test_the_error_of_a_step_is_raised_on_all_ranks(tmp_path, step, who):
    for steps, call in ((SAVING, "save"), (LOADING, "load")):
        if step not in steps:
            continue
        path = tmp_path / call
        job = Job(path)
        if call == "load":
            job.works()
        job.failing.at(step, who, lambda rank: OSError(f"disk {rank} is full"))
        results = getattr(job, call)()
        failed_alike(results, who, "disk {rank} is full", OSError)
        if call == "save":
            assert not (path / ".metadata").exists()
        job.failing.stop()
        job.works() if call == "save" else job.loads()


@pytest.mark.parametrize("step", ["create_local_plan", "write_data", "finish"])
def test_the_old_checkpoint_remains_after_a_failure(tmp_path, step):
    job = Job(tmp_path)
    job.works()
    before = (tmp_path / ".metadata").read_bytes()
    job.failing.at(step, (0,), lambda rank: OSError("no"))
    job.save()
    assert (tmp_path / ".metadata").read_bytes() == before
    job.failing.stop()
    job.loads()


@pytest.mark.parametrize(
    ("made", "kind", "text"),
    [
        (lambda rank: Ours("mine", rank), Ours, "('mine', {rank})"),
        (lambda rank: Unpicklable(f"locked {rank}"), RuntimeError, "Unpicklable: locked {rank}"),
        (lambda rank: Unreadable(f"odd {rank}", code=3), RuntimeError, "Unreadable: odd {rank}"),
        (lambda rank: CheckpointException("inner", {}), CheckpointException, None),
        (lambda rank: StopIteration(f"{rank}"), StopIteration, "{rank}"),
    ],
    ids=["own", "unpicklable", "unreadable", "torch's", "stop"],
)
@pytest.mark.parametrize("step", ["create_local_plan", "write_data"])
def test_errors_reach_other_ranks_unchanged_or_as_text(tmp_path, step, made, kind, text):
    job = Job(tmp_path)
    job.failing.at(step, (1, 2), made)
    for error in job.save():
        assert isinstance(error, CheckpointException)
        assert sorted(error.failures) == [1, 2]
        for rank, (cause, _) in error.failures.items():
            assert type(cause) is kind
            assert text is None or str(cause) == text.format(rank=rank)
    job.failing.stop()
    job.works()


def test_an_error_that_cannot_be_pickled_leaves_the_others_unchanged(tmp_path):
    job = Job(tmp_path)
    job.failing.at(
        "write_data", (1, 2), lambda rank: Unpicklable("x") if rank == 1 else Ours("y", 5)
    )
    for error in job.save():
        (first, _), (second, _) = error.failures[1], error.failures[2]
        assert (str(first), second.code) == ("Unpicklable: x", 5)


def test_a_plan_that_cannot_be_pickled_names_its_rank(tmp_path):
    job = Job(tmp_path)

    def lock_in(rank, plan):
        return dcp_failing.replace(plan, storage_data=Lock()) if rank == 3 else plan

    job.failing.change("prepare_local_plan", lock_in)
    for error in job.save():
        assert list(error.failures) == [3]
        assert "cannot pickle '_thread.lock' object" in str(error.failures[3][0])
    job.failing.stop()
    job.failing.change(
        "prepare_global_plan", lambda rank, plans: [lock_in(3, plan) for plan in plans]
    )
    for error in job.save():
        assert list(error.failures) == [0]
    job.failing.stop()
    job.works()


def test_a_global_plan_for_too_few_ranks_is_an_error_not_a_hang(tmp_path):
    job = Job(tmp_path)
    job.failing.change("prepare_global_plan", lambda rank, plans: plans[:2])
    for error in job.save():
        assert list(error.failures) == [0]
        assert isinstance(error.failures[0][0], IndexError)
    job.failing.stop()
    job.works()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_ends_its_rank_and_fails_the_others(tmp_path, interrupt):
    job = Job(tmp_path)
    job.failing.at("write_data", (1,), lambda rank: interrupt("stop"))
    results = job.save()
    assert type(results[1]) is interrupt
    for rank in (0, 2, 3):
        assert isinstance(results[rank], sk.RankFailed)
        assert (results[rank].rank, results[rank].phase) == (1, "write")
    job.failing.stop()
    job.works()


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("step", list(SAVING))
def test_without_collectives_a_failure_reaches_the_others(tmp_path, step, who):
    """No rank commits what it has written."""
    job = Job(tmp_path, use_collectives=False)
    job.failing.at(step, who, lambda rank: OSError(f"disk {rank} is full"))
    failed_alike(job.save(), who, "disk {rank} is full", OSError)
    if step != "finish":
        assert not list(tmp_path.glob("*.metadata"))
    job.failing.stop()
    job.works()
    assert len(list(tmp_path.glob("__*.metadata"))) == 4


def test_ranks_that_read_different_metadata_raise_an_error(tmp_path):
    Job(tmp_path / "each", use_collectives=False).works()
    Job(tmp_path / "all").works()
    job = Job(tmp_path / "all")
    _, reader = job.loaders[2]
    reader.reset(tmp_path / "each")

    def one(ranks):
        planner, reader = job.loaders[ranks.rank]
        with pytest.raises(
            CheckpointException, match=r"ranks \[2\] found only metadata that they have saved alone"
        ):
            load_with_planner(lambda: cleared(ranks.rank), Same(reader), planner, ranks)

    simulated_ranks.run(4, one, timeouts=Timeouts(10.0, 0.0, 5))


class Same:
    """A reader with the same name on all ranks."""

    checkpoint_id = "the checkpoint"

    def __init__(self, inner) -> None:
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_storage_of_one_rank_each_needs_no_common_path_without_collectives(tmp_path):
    """Each node saves to a disk of its own."""

    def one(ranks):
        writer = stock.FileSystemWriter(tmp_path / str(ranks.rank))
        save_with_planner(
            lambda: state(ranks.rank),
            writer,
            stock.DefaultSavePlanner(),
            ranks,
            use_collectives=False,
        )

    simulated_ranks.run(4, one, timeouts=Timeouts(10.0, 0.0, 5))
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*.metadata")}
    assert found == {f"{rank}/__{rank}.metadata" for rank in range(4)}


def test_each_ranks_planner_plans_alone_where_ranks_have_saved_alone(tmp_path):
    job = Job(tmp_path, use_collectives=False)
    job.works()
    seen = []
    job.failing.change("create_global_plan", lambda rank, plans: seen.append(rank) or plans)
    job.loads()
    assert sorted(seen) == [0, 1, 2, 3]


def test_missing_metadata_is_reported_for_the_checkpoint(tmp_path):
    Job(tmp_path, use_collectives=False).works()
    job = Job(tmp_path)
    (tmp_path / "__1.metadata").write_bytes(b"broken")
    for error in job.load():
        assert list(error.failures) == [1]
        assert not isinstance(error.failures[1][0], FileNotFoundError)
    (tmp_path / "__1.metadata").unlink()
    for error in job.load():
        assert str(error.failures[1][0]).endswith(f"{str(tmp_path / '.metadata')!r}")


def test_a_future_that_fails_later_fails_the_save(tmp_path):
    class Writer(stock.FileSystemWriter):
        def write_data(self, plan, planner):
            future: Future = Future()

            def later():
                time.sleep(0.1)
                future.set_exception(OSError("late"))

            Thread(target=later).start()
            return future

    with pytest.raises(CheckpointException, match="late") as caught:
        dcp.save({"n": 1}, storage_writer=Writer(tmp_path))
    assert isinstance(caught.value.failures[0][0], OSError)


# --- on real ranks -------------------------------------------------------------------------------

SOON = {"SHARDKEEP_HEARTBEAT_SECONDS": "0.3", "SHARDKEEP_MAX_MISSED_HEARTBEATS": "6"}


@pytest.mark.parametrize("step", ["set_up_planner", "create_global_plan", "write_data", "finish"])
def test_on_real_ranks(gloo, tmp_path, step):
    who = [0] if step in COORDINATORS else [1, 3]
    ends = gloo.run(dcp_failing.save_twice, str(tmp_path), step, who, env=SOON)
    for end in ends:
        assert end["failures"] == {rank: ("OSError", f"disk {rank} is full") for rank in who}
        assert end["is_checkpoint_exception"]
        assert end["took"] < PROMPT_SECONDS
        assert not end["committed"]
        assert end["then"] == "loaded"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_rank_is_named_by_the_others(gloo, tmp_path):
    with pytest.raises(Failed) as caught:
        gloo.run(dcp_failing.killed, str(tmp_path), env=SOON)
    assert list(caught.value.errors) == [2]
    for rank in (0, 1, 3):
        end = caught.value.results[rank]
        assert end["is_checkpoint_exception"]
        assert end["failures"] == {2: "RankFailed"}
        assert end["phase"] == "write"
        assert end["took"] < PROMPT_SECONDS
    assert not (tmp_path / ".metadata").exists()
