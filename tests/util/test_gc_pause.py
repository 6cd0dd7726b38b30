"""The garbage collector is on again when the last pause has ended."""

from __future__ import annotations

import gc
import os
import threading

import pytest

from shardkeep.util import gc_pause
from support import forking


@pytest.fixture(autouse=True)
def _as_it_was():
    was = gc.isenabled()
    gc.enable()
    yield
    gc.enable() if was else gc.disable()


@pytest.mark.parametrize("on", [True, False])
def test_it_is_off_inside_the_block_and_restored_after_it(on):
    gc.enable() if on else gc.disable()
    with gc_pause.paused():
        assert not gc.isenabled()
        with gc_pause.paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled() == on


def test_overlapping_pauses_of_two_threads_leave_it_on():
    """The second pause, which ends last, found the collector off."""
    first, second = gc_pause.paused(), gc_pause.paused()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled(), "the second is not over"
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_a_thread_between_check_and_action_does_not_turn_it_off_for_good(monkeypatch):
    asked, real = threading.Event(), gc.isenabled
    over = threading.Event()

    def slowly() -> bool:
        was = real()
        if threading.current_thread() is slow:
            asked.set()
            over.wait(0.5)  # not for ever: who ends meanwhile may have to wait for this one
        return was

    def work() -> None:
        with gc_pause.paused():
            pass

    slow = threading.Thread(target=work)
    monkeypatch.setattr(gc_pause.gc, "isenabled", slowly)
    with gc_pause.paused():
        slow.start()
        asked.wait(0.5)  # it does not ask where another one has turned it off
    over.set()
    slow.join()
    assert real()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no such processes there")
def test_it_is_on_in_a_process_forked_during_a_pause():
    def on() -> None:
        assert gc.isenabled()
        with gc_pause.paused():
            assert not gc.isenabled()
        assert gc.isenabled()

    inside, over = threading.Event(), threading.Event()

    def pause() -> None:
        with gc_pause.paused():
            inside.set()
            over.wait(30)

    thread = threading.Thread(target=pause)
    thread.start()
    assert inside.wait(10)
    try:
        assert forking.ends_well(on)
    finally:
        over.set()
        thread.join()
