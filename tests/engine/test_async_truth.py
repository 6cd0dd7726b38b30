"""Asynchronous saves save the state of the call, report every error, and leave nothing behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shardkeep as sk
import shardkeep.dcp as dcp
from shardkeep.coordination.contract import Ranks
from shardkeep.engine import handles
from shardkeep.errors import AsyncSaveFailed, RankFailed
from shardkeep.stores import LocalStore
from shardkeep.testing import simulated_ranks
from support import forking
from support.copying import change, changeable, gate


@pytest.fixture(autouse=True)
def _no_memory_is_kept():
    yield
    sk.release_memory()


def contents(path) -> dict:
    """Return all contents of a checkpoint, bit for bit."""
    ckpt = sk.open(path)
    assert ckpt.verify().ok
    return {
        name: ckpt.read(name).tobytes() if ckpt.is_tensor(name) else repr(ckpt.read(name))
        for name in ckpt
    }


class Full(LocalStore):
    """A folder on a disk without free space."""

    def open_positioned_writer(self, name, nbytes):
        raise OSError(errno.ENOSPC, "No space left on device", self.path_of(name))


# --- the state as it was --------------------------------------------------------------------------


def by_shardkeep(state, path):
    return sk.async_save(state, path)


def by_dcp(state, path):
    return dcp.async_save(state, checkpoint_id=path)


def by_dcp_and_a_planner_of_the_users_own(state, path):
    class Planner(dcp.DefaultSavePlanner):
        pass

    return dcp.async_save(state, checkpoint_id=path, planner=Planner())


@pytest.mark.parametrize(
    "save", [by_shardkeep, by_dcp, by_dcp_and_a_planner_of_the_users_own], ids=lambda f: f.__name__
)
def test_changes_after_async_save_returns_are_not_saved(tmp_path, save):
    mine, reference = changeable(), changeable()
    (sk.save if save is by_shardkeep else dcp.save)(
        reference, **{"path" if save is by_shardkeep else "checkpoint_id": tmp_path / "reference"}
    )
    with gate() as opened:
        handle = save(mine, tmp_path / "ckpt")
        change(mine)
        time.sleep(0.05)
        assert not handle.done()
        opened.set()
        handle.result(60)
    assert contents(tmp_path / "ckpt") == contents(tmp_path / "reference")


# --- no error is lost -----------------------------------------------------------------------------


def fail_unreported(path) -> None:
    handle = sk.async_save({"w": torch.ones(3)}, Full(path))
    while not handle.done():
        time.sleep(0.001)


def causes(error):
    while error is not None:
        yield error
        error = error.__cause__


@pytest.mark.parametrize("how", ["save", "async_save", "dcp.save", "dcp.async_save"])
def test_an_unreported_error_is_raised_by_the_next_save(tmp_path, how):
    state, there = {"w": torch.ones(3)}, tmp_path / "next"
    begin = {
        "save": lambda: sk.save(state, there),
        "async_save": lambda: sk.async_save(state, there),
        "dcp.save": lambda: dcp.save(state, checkpoint_id=there),
        "dcp.async_save": lambda: dcp.async_save(state, checkpoint_id=there),
    }[how]
    fail_unreported(tmp_path / "full")
    with pytest.raises(AsyncSaveFailed) as caught:
        begin()
    message = (
        f"an asynchronous save to {tmp_path / 'full'} failed, and its result was never retrieved"
    )
    assert message in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert "this save was not started" in str(caught.value)
    assert errno.ENOSPC in [getattr(error, "errno", None) for error in causes(caught.value)]
    assert not there.exists()
    done = begin()  # It is raised only once.
    if "async" in how:
        done.result(60)
    assert sk.open(there).verify().ok


def test_an_unreported_error_of_a_dcp_future_is_raised_by_the_next_save(tmp_path, monkeypatch):
    monkeypatch.setattr(LocalStore, "open_positioned_writer", Full.open_positioned_writer)
    future = dcp.async_save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "a")
    while not future.done():
        time.sleep(0.001)
    monkeypatch.undo()
    with pytest.raises(AsyncSaveFailed, match="No space left on device"):
        dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "b")


@pytest.mark.parametrize("ask", ["result", "exception"])
def test_a_reported_error_is_not_raised_again(tmp_path, monkeypatch, ask):
    monkeypatch.setattr(LocalStore, "open_positioned_writer", Full.open_positioned_writer)
    future = dcp.async_save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "a")
    if ask == "exception":
        assert future.exception(60).errno == errno.ENOSPC
    else:
        with pytest.raises(OSError, match="No space"):
            future.result(60)
    monkeypatch.undo()
    sk.save({"w": torch.ones(3)}, tmp_path / "b")


def one_of_them_asks(ranks: Ranks, path: str) -> list[str]:
    """Fail on rank 2, request the result on rank 0 only, and save twice more."""
    state = {"mine": {ranks.rank: torch.full((4,), float(ranks.rank))}}
    handle = sk.async_save(state, Full(path) if ranks.rank == 2 else path, ranks=ranks)
    ends = []
    if ranks.rank == 0:
        with pytest.raises(RankFailed):
            handle.result(60)
    for _ in range(2):
        try:
            sk.save(state, path, ranks=ranks)
            ends.append("saved")
        except RankFailed as error:
            ends.append(f"told of rank {error.rank} in {error.phase}: {error}")
        except AsyncSaveFailed as error:
            ends.append(f"raised: {error}")
    return ends


def test_ranks_with_an_unreported_error_do_not_make_others_wait(tmp_path):
    path = str(tmp_path / "ckpt")
    ends = simulated_ranks.run(4, one_of_them_asks, path)
    assert ends[0][0].startswith("told of rank ")
    for first, _ in ends:  # The second rank to raise gets the error of the first.
        assert " in describe" in first or first.startswith("raised: an asynchronous save to ")
        assert "its result was never retrieved" in first
    assert [rank[1] for rank in ends] == ["saved"] * 4
    assert sk.open(path).verify().ok


def test_a_program_logs_unreported_errors_as_it_ends(tmp_path):
    program = (
        "import errno, torch, shardkeep as sk\n"
        "from shardkeep.stores import LocalStore\n"
        "class Full(LocalStore):\n"
        "    def open_positioned_writer(self, name, nbytes):\n"
        "        raise OSError(errno.ENOSPC, 'No space left on device')\n"
        f"sk.async_save({{'w': torch.ones(3)}}, Full({str(tmp_path)!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        "The program ends, and nobody requested the result of a failed asynchronous save to "
        f"{tmp_path}: [Errno 28] No space left on device"
    ) in done.stderr


# --- interrupted while the state is copied --------------------------------------------------------


class Interrupting:
    """An object whose `state_dict` interrupts the main thread and waits for the interrupt."""

    def state_dict(self):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.3)
        return {"w": torch.ones(3)}

    def load_state_dict(self, state):
        raise AssertionError


@pytest.mark.parametrize("budget", [None, 1])
def test_a_save_interrupted_while_the_state_is_copied_saves_nothing(tmp_path, budget):
    """The caller may change the state after the interrupt."""
    with pytest.raises(KeyboardInterrupt):
        sk.async_save({"m": Interrupting()}, tmp_path / "ckpt", max_host_memory=budget)
    sk.save({"w": torch.ones(3)}, tmp_path / "next")  # The interrupt is not an unreported error.
    with pytest.raises(sk.NotACheckpoint):
        sk.open(tmp_path / "ckpt")
    assert list(tmp_path.glob("ckpt/*")) == []


class InterruptingStore(LocalStore):
    """A store that interrupts the main thread while the state has not been read yet."""

    def open_positioned_writer(self, name, nbytes):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.3)
        return super().open_positioned_writer(name, nbytes)


def test_a_save_interrupted_while_the_worker_reads_the_state_saves_nothing(tmp_path):
    """A state that is larger than the budget is written in place, while the caller waits."""
    with pytest.raises(KeyboardInterrupt):
        sk.async_save(
            {"w": torch.ones(1 << 20)}, InterruptingStore(tmp_path / "ckpt"), max_host_memory=1
        )
    sk.save({"w": torch.ones(3)}, tmp_path / "next")  # The interrupt is not an unreported error.
    with pytest.raises(sk.NotACheckpoint):
        sk.open(tmp_path / "ckpt")
    assert list(tmp_path.glob("ckpt/*")) == []


def test_an_error_of_state_dict_on_one_rank_is_raised_on_all(gloo, tmp_path):
    ends = gloo.run("support.failing:stateless", str(tmp_path))
    for rank, (end, late) in enumerate(ends):
        assert end == ("ValueError: no state today" if rank == 2 else "told: no state today")
        assert late == "saved"


# --- nothing is left behind -----------------------------------------------------------------------


def many(way: str, saves: int, path: Path) -> dict:
    tests = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "support.many", way, str(saves), str(path)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("way", ["async", "managers"])
def test_saves_in_quick_succession_leak_nothing(tmp_path, way):
    """Make 100 saves; for other numbers, run `python -m support.many async 1000 FOLDER`."""
    found = many(way, 100, tmp_path)
    assert len(set(found["threads"])) == 1
    assert len(set(found["files"])) == 1
    assert found["most files"] < 64
    assert found["bytes per save"] < 16 * 1024
    assert found["grown"] < 4 << 20
    kept = {"async": ["a", "b"], "managers": ["a/step_98", "b/step_99"]}
    for name in kept[way]:
        assert sk.open(tmp_path / name).verify().ok
        assert len(list((tmp_path / name).iterdir())) == 3  # data, manifest, .metadata


# --- processes forked meanwhile -------------------------------------------------------------------


class Gate(LocalStore):
    """A store whose files are not written before it is opened."""

    opened = threading.Event()

    def open_positioned_writer(self, name, nbytes):
        assert self.opened.wait(60)
        return super().open_positioned_writer(name, nbytes)


@pytest.fixture
def under_way(tmp_path):
    """Start a save that does not end before the test does."""
    store = Gate(tmp_path / "parent")
    store.opened = threading.Event()
    handle = sk.async_save({"w": torch.ones(3)}, store)
    yield handle
    store.opened.set()
    assert handle.result(60).tensors == 1


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no such processes there")


@needs_fork
def test_a_process_forked_during_a_save_ends(under_way):
    """Workers of a `DataLoader` are forked, and must not wait for their parent's save."""
    assert forking.ends_well(lambda: None)
    assert not under_way.done()


@needs_fork
def test_a_process_forked_during_a_save_can_save(tmp_path, under_way):
    def saves() -> None:
        torch.set_num_threads(1)
        sk.save({"w": torch.zeros(3)}, tmp_path / "now")
        sk.async_save({"w": torch.zeros(3)}, tmp_path / "later")
        dcp.async_save({"w": torch.zeros(3)}, checkpoint_id=tmp_path / "dcp")

    assert forking.ends_well(saves)
    assert not under_way.done()
    for name in ("now", "later", "dcp"):
        assert sk.open(tmp_path / name).verify().ok


@needs_fork
def test_a_forked_process_does_not_raise_errors_of_its_parent(tmp_path):
    fail_unreported(tmp_path / "full")
    assert forking.ends_well(lambda: sk.save({"n": 1}, tmp_path / "child"))
    with pytest.raises(AsyncSaveFailed):
        sk.save({"n": 1}, tmp_path / "parent")


# --- waiting for a while --------------------------------------------------------------------------


def test_a_wait_that_timed_out_does_not_count_as_a_waiter():
    """Otherwise, a loop that polls a save would prevent it from pausing."""
    outcome = handles.SaveFuture()
    for ask in (handles.Handle(outcome).result, outcome.exception):
        with pytest.raises(handles.FutureTimeoutError):
            ask(timeout=0)
        assert not outcome.has_waiters
    waits = threading.Thread(target=outcome.result)
    waits.start()
    while not outcome.has_waiters:
        time.sleep(0.001)
    with pytest.raises(TimeoutError):
        handles.Handle(outcome).result(timeout=0)
    assert outcome.has_waiters  # by the other thread
    outcome.set_result(None)
    waits.join()


def test_a_save_that_ends_at_the_timeout_returns_its_result():
    class Late(handles.SaveFuture):
        def result(self, timeout=None):
            try:
                return super().result(timeout)
            except handles.FutureTimeoutError:
                self.set_result("the report")
                raise

    assert handles.Handle(Late()).result(timeout=0) == "the report"


def test_a_timeout_is_the_built_in_error_where_futures_raise_another(monkeypatch):
    """Python 3.10 has separate classes of `TimeoutError` in `builtins` and `concurrent.futures`."""

    class OfFutures(Exception):
        pass

    class Old(handles.SaveFuture):
        def result(self, timeout=None):
            raise OfFutures

    monkeypatch.setattr(handles, "FutureTimeoutError", OfFutures)
    with pytest.raises(TimeoutError, match="the save is not durable after 1 s; it goes on"):
        handles.Handle(Old()).result(timeout=1)
