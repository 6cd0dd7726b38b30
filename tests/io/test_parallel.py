"""Threads of a parallel call end with the call, also after errors and interrupts."""

from __future__ import annotations

import threading
import time

import pytest

from shardkeep.io import pool
from shardkeep.io.pool import ProgressMeter, parallel


@pytest.fixture(autouse=True)
def no_thread_stays():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("threads", [1, 2, 7, 500])
def test_every_job_is_done_once(threads):
    done = []
    parallel(list(range(300)), done.extend, threads)
    assert sorted(done) == list(range(300))


def test_the_calling_thread_works_too():
    names = set()
    parallel([1], lambda jobs: [names.add(threading.current_thread()) for _ in jobs], 8)
    assert names == {threading.current_thread()}


def test_jobs_run_at_the_same_time():
    barrier, places = threading.Barrier(4, timeout=60), []
    parallel(list(range(4)), lambda jobs: places.extend(barrier.wait() for _ in jobs), 4)
    assert sorted(places) == [0, 1, 2, 3]


@pytest.mark.parametrize("threads", [1, 4])
def test_the_first_error_stops_all(threads):
    done = []

    def worker(jobs):
        for job in jobs:
            if job == 3:
                raise KeyError("third")
            done.append(job)
            time.sleep(0.001)

    with pytest.raises(KeyError, match="third"):
        parallel(list(range(10_000)), worker, threads)
    assert len(done) < 100


def test_an_interrupt_is_raised_after_all_threads_have_ended():
    main, ended = threading.current_thread(), threading.Event()
    begun = threading.Event()

    def worker(jobs):
        for _ in jobs:
            if threading.current_thread() is main:
                assert begun.wait(60)
                raise KeyboardInterrupt
            begun.set()
            time.sleep(0.05)
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        parallel(list(range(2)), worker, 2)
    assert ended.is_set()


def test_the_meter_sums_the_progress_of_threads():
    told = []
    meter = ProgressMeter(lambda *what: told.append(what), "read", 10)
    meter.add(4)
    meter.add(6)
    assert told == [("read", 4, 10), ("read", 10, 10)]
    ProgressMeter(None, "read", 10).add(4)


class Refused(threading.Thread):
    """A thread whose start fails if it is the third one of a call."""

    why: BaseException = RuntimeError("can't start new thread")
    after = False
    """Whether the thread was started anyway, as if Ctrl-C came while `start` waited for it."""

    def start(self) -> None:
        if not self.name.endswith("-2"):
            super().start()
            return
        if self.after:
            super().start()
        raise self.why


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("why", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
def test_a_thread_that_cannot_be_started_stops_the_others(monkeypatch, why, after):
    monkeypatch.setattr(Refused, "why", why)
    monkeypatch.setattr(Refused, "after", after)
    monkeypatch.setattr(pool, "Thread", Refused)
    done = []

    def worker(jobs):
        for job in jobs:
            done.append(job)
            time.sleep(0.01)

    with pytest.raises(type(why)) as caught:
        parallel(list(range(300)), worker, 8)
    assert caught.value is why
    assert len(done) < 100
