"""`async_save` returns when the state is copied, and saves the state as it was then."""

from __future__ import annotations

import gc
import math
import os
import threading
import time
import weakref
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shardkeep as sk
from shardkeep.engine import async_save, execution
from shardkeep.stores import LocalStore
from shardkeep.testing import simulated_ranks
from support import jobs, scenarios
from support.scenarios import values


@pytest.fixture(autouse=True)
def _no_memory_is_kept():
    yield
    sk.release_memory()


class Gate(LocalStore):
    """A store that creates no data file before its gate is opened."""

    def __init__(self, path):
        super().__init__(path)
        self.opened = threading.Event()

    def open_positioned_writer(self, name, nbytes):
        assert self.opened.wait(60)
        return super().open_positioned_writer(name, nbytes)


def state(seed: str = "") -> dict:
    tied = values(f"tied{seed}", (700, 300), torch.float32)
    return {
        "w": tied,
        "again": tied,
        "t": values(f"t{seed}", (64, 48), torch.bfloat16).t(),
        "small": [values(f"s{n}{seed}", (4,), torch.float32) for n in range(50)],
        "object": {"numbers": [1, 2, 3], "text": seed},
    }


def loaded(path) -> dict:
    template = state("other")
    template["object"] = {"numbers": None, "text": None}
    sk.load(template, path)
    return template


def same(a: dict, b: dict) -> bool:
    tensors = [(a["w"], b["w"]), (a["again"], b["again"]), (a["t"], b["t"])]
    tensors += zip(a["small"], b["small"], strict=True)
    return all(map(scenarios.same, *zip(*tensors, strict=True))) and a["object"] == b["object"]


@pytest.mark.parametrize("budget", [None, 1 << 20])
def test_changes_after_the_return_are_not_saved(tmp_path, budget):
    mine, store = state("a"), Gate(tmp_path)
    if budget is not None:
        store.opened.set()  # The call returns when the last bytes have been read.
    handle = sk.async_save(mine, store, max_host_memory=budget)
    for tensor in (mine["w"], mine["t"], *mine["small"]):
        tensor.view(torch.uint8).zero_() if tensor.is_contiguous() else tensor.zero_()
    mine["object"]["numbers"].append(4)
    mine["object"]["text"] = "changed"
    store.opened.set()
    report = handle.result(timeout=60)
    assert handle.done()
    assert same(loaded(tmp_path), state("a"))
    assert sk.open(tmp_path).verify().ok
    assert list(report.seconds) == ["plan", "stage", "write", "sync", "commit"]


def test_nothing_is_committed_before_the_return_and_result_waits(tmp_path):
    store = Gate(tmp_path)
    handle = sk.async_save(state(), store)
    assert not handle.done() and repr(handle) == "<SaveHandle: running>"
    with pytest.raises(sk.NotACheckpoint):
        sk.open(tmp_path)
    with pytest.raises(TimeoutError, match=r"the save is not durable after 0\.01 s; it goes on"):
        handle.result(timeout=0.01)
    store.opened.set()
    assert handle.result(60).path == str(tmp_path)
    assert repr(handle) == f"<SaveHandle: done, {handle.result()!r}>"


def test_a_save_waits_for_the_previous_one(tmp_path):
    """Successive saves share memory, and may write to the same path."""
    store = Gate(tmp_path / "a")
    first = sk.async_save(state("a"), store)
    done = []
    others = [
        threading.Thread(target=lambda: done.append(sk.async_save(state("b"), tmp_path / "b"))),
        threading.Thread(target=lambda: done.append(sk.save(state("c"), tmp_path / "c"))),
    ]
    for other in others:
        other.start()
        other.join(0.2)
    assert not done
    store.opened.set()
    for other in others:
        other.join(60)
    assert first.done() and len(done) == 2
    next(one for one in done if isinstance(one, sk.SaveHandle)).result(60)
    for name in "abc":
        assert same(loaded(tmp_path / name), state(name))


def test_errors_before_the_copy_are_raised_by_the_call_and_later_ones_by_result(tmp_path):
    sk.save({"a": 1}, tmp_path / "taken")
    with pytest.raises(sk.AlreadyExists, match="already holds a checkpoint"):
        sk.async_save(state(), tmp_path / "taken")
    with pytest.raises(sk.Conflict, match="object 'f' cannot be pickled"):
        sk.async_save({"f": lambda: 0}, tmp_path / "x")

    class Full(LocalStore):
        def open_positioned_writer(self, name, nbytes):
            raise OSError(28, "No space left on device")

    handle = sk.async_save(state(), Full(tmp_path / "full"))
    with pytest.raises(OSError, match="No space left on device"):
        handle.result(60)
    assert sk.async_save(state(), tmp_path / "next").result(60).tensors == 53


def test_tensors_are_freed_once_they_are_copied(tmp_path):
    store, mine = Gate(tmp_path), state()
    known = weakref.ref(mine["small"][0])
    handle = sk.async_save(mine, store)
    del mine
    gc.collect()
    assert known() is None
    store.opened.set()
    handle.result(60)


def test_memory_is_reused_until_it_is_released(tmp_path):
    sk.async_save(state(), tmp_path / "a").result(60)
    (arena,) = [arena for arena in async_save._arenas.values() if arena.nbytes]
    address = arena.take(arena.nbytes).ctypes.data
    sk.async_save(state(), tmp_path / "b").result(60)
    assert arena.take(arena.nbytes).ctypes.data == address
    sk.release_memory()
    assert arena.nbytes == 0
    sk.async_save(state(), tmp_path / "c").result(60)
    assert same(loaded(tmp_path / "c"), state())


def test_many_saves_leak_nothing(tmp_path):
    def counts():
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    mine = state()
    for number in range(40):
        handle = sk.async_save(mine, tmp_path / "ckpt", overwrite=True)
        if number % 7 == 0:
            handle.result(60)
        if number == 10:
            handle.result(60)
            before = counts()
    handle.result(60)
    assert counts() == before
    assert len(list(tmp_path.glob("ckpt/*"))) == 3  # data, manifest, .metadata
    assert same(loaded(tmp_path / "ckpt"), mine)


def test_low_priority_does_not_change_the_priority_of_the_caller(tmp_path):
    before = os.getpriority(os.PRIO_PROCESS, 0)
    seen = []

    class Watched(LocalStore):
        def open_positioned_writer(self, name, nbytes):
            seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            return super().open_positioned_writer(name, nbytes)

    sk.async_save(state(), Watched(tmp_path / "a"), low_priority=True).result(60)
    sk.async_save(state(), Watched(tmp_path / "b")).result(60)
    assert seen == [19, before]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_a_background_save_writes_with_one_thread(tmp_path, monkeypatch):
    """Each thread that returns from a system call competes for the interpreter lock."""
    seen = set()
    real = os.pwritev

    def pwritev(*args):
        seen.add(threading.get_native_id())
        time.sleep(0.02)  # so that other threads get work, too
        return real(*args)

    monkeypatch.setattr(os, "pwritev", pwritev)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    mine = {"t": values("t", (16 << 20,), torch.float32)}
    for save, expected in (
        (lambda: sk.async_save(mine, tmp_path / "b").result(60), 1),
        (lambda: sk.save(mine, tmp_path / "a"), 4),
    ):
        seen.clear()
        save()
        assert len(seen) == expected


@pytest.mark.parametrize("waits", [False, True])
def test_a_background_commit_pauses_until_a_thread_waits_for_it(tmp_path, monkeypatch, waits):
    """The commit delays a training loop only in short pieces."""
    calls = []

    class Watched(execution.Throttle):
        def __call__(self):
            due = time.thread_time() - (self._since or math.inf) > execution._WORK_SECONDS
            began = time.perf_counter()
            super().__call__()
            calls.append((due, time.perf_counter() - began >= execution._PAUSE_SECONDS))

    monkeypatch.setattr(execution, "Throttle", Watched)
    mine = {f"t{n}": torch.zeros(3) for n in range(3000)}
    handle = sk.async_save(mine, tmp_path / "a")
    if waits:
        handle.result(60)
    while not handle.done():
        time.sleep(0.01)
    handle.result(60)
    assert len(calls) > 30  # mostly columns
    assert any(rested for _, rested in calls) != waits
    assert waits or all(rested for due, rested in calls if due)


def test_a_save_in_the_foreground_does_not_pause(monkeypatch, tmp_path):
    monkeypatch.setattr(execution.Throttle, "__call__", lambda _: pytest.fail("it paused"))
    assert sk.save(state(), tmp_path / "a").tensors


def test_more_small_tensors_than_fit_in_one_window_are_saved_correctly(tmp_path):
    """The CRC-32 of the first tensor of a window was once 0, so the checkpoint seemed damaged."""
    mine = {f"t{n}": torch.full((16,), float(n)) for n in range(60_000)}
    sk.async_save(mine, tmp_path / "a").result(60)
    again = {name: torch.zeros(16) for name in mine}
    report = sk.load(again, tmp_path / "a")
    assert not report.unchecked
    assert all(torch.equal(again[name], tensor) for name, tensor in mine.items())


def save_twice(ranks, path):
    rows = [(0, 2), (2, 3), (5, 1)][ranks.rank]
    whole = values("sharded", (6, 4), torch.float32)
    mine = sk.Shards((6, 4), [((rows[0], 0), whole[rows[0] : sum(rows)].clone())])
    for number in range(2):
        handle = sk.async_save({"w": mine, "n": number}, f"{path}/{number}", ranks=ranks)
        mine.parts[0][1].neg_()
    return handle.result(60).slowest[0]


def test_simulated_ranks_save_at_the_same_time(tmp_path):
    slowest = simulated_ranks.run(3, save_twice, str(tmp_path))
    assert len(set(slowest)) == 1 and slowest[0] in (0, 1, 2)
    whole = values("sharded", (6, 4), torch.float32)
    for number, expected in enumerate([whole, -whole]):
        ckpt = sk.open(tmp_path / str(number))
        assert ckpt.read("w").tobytes() == scenarios.bits(expected)
        assert ckpt["n"].value == number


@pytest.mark.gloo
def test_real_ranks_save_asynchronously(gloo, tmp_path):
    """A training collective runs in another thread of each rank meanwhile."""
    reports = gloo.run(jobs.async_saves, str(tmp_path / "ckpt"))
    assert len({report["slowest"] for report in reports}) == 1
    for report in reports:
        assert report["phases"] == ["plan", "stage", "write", "sync", "commit"]
    assert sk.open(tmp_path / "ckpt").verify().ok
    for leaves in gloo.run(jobs.read_back, str(tmp_path / "ckpt"), size=2):
        assert leaves["mine.3"][2] == torch.full((4,), 3.0).numpy().tobytes()


@pytest.mark.gloo
def test_all_results_name_a_rank_that_fails_later(gloo, tmp_path):
    ends = gloo.run(jobs.failing_async_save, str(tmp_path / "ckpt"))
    assert [end["kind"] for end in ends] == ["RankFailed", "RankFailed", "OSError", "RankFailed"]
    assert all(end["at"] == "result" for end in ends)
    for rank in (0, 1, 3):
        assert (ends[rank]["rank"], ends[rank]["phase"]) == (2, "write")
    with pytest.raises(sk.NotACheckpoint):
        sk.open(tmp_path / "ckpt")
