"""Handles of background saves: results, errors, callbacks and `await`."""

from __future__ import annotations

import asyncio
import errno
import threading

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shardkeep as sk
from shardkeep.errors import AsyncSaveFailed
from shardkeep.stores import LocalStore

STATE = {"w": torch.ones(3), "n": 1}


@pytest.fixture(autouse=True)
def _free_memory():
    yield
    sk.release_memory()


class FullStore(LocalStore):
    """A folder on a disk without free space."""

    def open_positioned_writer(self, name, nbytes):
        raise OSError(errno.ENOSPC, "No space left on device", self.path_of(name))


class GatedStore(LocalStore):
    """A store that creates no data file before its gate is opened."""

    def __init__(self, path):
        super().__init__(path)
        self.gate = threading.Event()

    def open_positioned_writer(self, name, nbytes):
        assert self.gate.wait(60)
        return super().open_positioned_writer(name, nbytes)


def test_exception_returns_the_error_and_counts_as_reported(tmp_path):
    handle = sk.async_save(STATE, FullStore(tmp_path / "full"))
    assert handle.exception(60).errno == errno.ENOSPC
    assert sk.async_save(STATE, tmp_path / "next").exception(60) is None


def test_exception_raises_a_timeout_while_the_save_goes_on(tmp_path):
    store = GatedStore(tmp_path)
    handle = sk.async_save(STATE, store)
    with pytest.raises(TimeoutError, match=r"the save is not durable after 0\.01 s; it goes on"):
        handle.exception(timeout=0.01)
    store.gate.set()
    assert handle.exception(60) is None


def test_a_callback_gets_the_handle_when_the_save_has_ended(tmp_path):
    store, seen = GatedStore(tmp_path), []
    ended = threading.Event()
    handle = sk.async_save(STATE, store)
    handle.add_done_callback(lambda got: (seen.append((got, got.result().tensors)), ended.set()))
    assert not seen
    store.gate.set()
    assert ended.wait(60) and seen == [(handle, 1)]
    handle.add_done_callback(seen.append)  # The save has ended, so the callback is called at once.
    assert seen[1:] == [handle]


def test_a_callback_may_save(tmp_path):
    """The worker thread calls it, so its save must not wait for the worker."""
    later, ended = [], threading.Event()

    def callback(handle):
        sk.save(STATE, tmp_path / "now")
        later.append(sk.async_save(STATE, tmp_path / "later"))
        ended.set()

    sk.async_save(STATE, tmp_path / "first").add_done_callback(callback)
    assert ended.wait(60)
    later[0].result(60)
    for name in ("first", "now", "later"):
        assert sk.open(tmp_path / name).verify().ok


def test_a_callback_that_raises_is_logged_and_harms_nothing(tmp_path, caplog):
    store = GatedStore(tmp_path)
    handle = sk.async_save(STATE, store)
    handle.add_done_callback(lambda handle: 1 / 0)
    store.gate.set()
    assert handle.result(60).tensors == 1
    sk.save(STATE, tmp_path / "next")
    assert "ZeroDivisionError" in caplog.text


def test_a_callback_alone_does_not_count_as_a_request_for_the_result(tmp_path):
    ended = threading.Event()
    handle = sk.async_save(STATE, FullStore(tmp_path / "full"))
    handle.add_done_callback(lambda handle: ended.set())
    assert ended.wait(60)
    with pytest.raises(AsyncSaveFailed, match="No space left"):
        sk.save(STATE, tmp_path / "next")


def test_a_handle_can_be_awaited(tmp_path):
    async def save() -> sk.SaveReport:
        return await sk.async_save(STATE, tmp_path / "a")

    assert asyncio.run(save()).path == str(tmp_path / "a")


def test_await_raises_the_error_of_the_save(tmp_path):
    async def save() -> None:
        await sk.async_save(STATE, FullStore(tmp_path / "full"))

    with pytest.raises(OSError, match="No space left on device"):
        asyncio.run(save())
    sk.save(STATE, tmp_path / "next")  # The error was reported.


def test_cancelling_a_task_that_awaits_a_handle_leaves_the_save_alone(tmp_path):
    store = GatedStore(tmp_path / "a")

    async def save() -> sk.SaveHandle:
        handle = sk.async_save(STATE, store)

        async def wait() -> None:
            await handle

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return handle

    handle = asyncio.run(save())
    store.gate.set()
    assert handle.result(60).tensors == 1
    assert sk.open(tmp_path / "a").verify().ok


def test_repr_shows_the_state_of_the_save(tmp_path):
    store = GatedStore(tmp_path / "a")
    handle = sk.async_save(STATE, store)
    assert repr(handle) == "<SaveHandle: running>"
    store.gate.set()
    report = handle.result(60)
    assert repr(handle) == f"<SaveHandle: done, {report!r}>"
    assert repr(report).startswith(f"<SaveReport: {tmp_path / 'a'}, 1 tensor, 1 object, ")
    failed = sk.async_save(STATE, FullStore(tmp_path / "full"))
    while not failed.done():
        pass
    assert repr(failed).startswith("<SaveHandle: failed, OSError: [Errno 28] No space left")
    with pytest.raises(AsyncSaveFailed):  # Looking at the repr does not report the error.
        sk.save(STATE, tmp_path / "b")


def test_saves_of_both_priorities_keep_their_order(tmp_path):
    """Each priority has its own worker."""
    store, order = GatedStore(tmp_path / "0"), []
    handles = [sk.async_save(STATE, store, low_priority=True)]
    handles[0].add_done_callback(lambda _: order.append(0))
    store.gate.set()
    for number in range(1, 5):
        handle = sk.async_save(STATE, tmp_path / str(number), low_priority=number % 2 == 0)
        handle.add_done_callback(lambda _, number=number: order.append(number))
        handles.append(handle)
    handles[-1].result(60)
    for handle in handles:
        handle.result(60)
    assert order == [0, 1, 2, 3, 4]


def test_the_state_is_copied_on_the_thread_of_the_caller(tmp_path):
    """Work that an accelerator still has to do is ordered by the caller's own stream."""
    threads = []

    class Model:
        def state_dict(self):
            threads.append(threading.current_thread())
            return {"w": torch.ones(3)}

        def load_state_dict(self, state):
            raise AssertionError

    sk.async_save({"model": Model()}, tmp_path / "a").result(60)
    assert threads == [threading.current_thread()]
