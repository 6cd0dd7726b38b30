"""The store that fails on purpose: by number, at random by seed, and for good after a crash."""

from __future__ import annotations

import doctest
import errno
from concurrent.futures import ThreadPoolExecutor

import pytest

from shardkeep.stores import MemoryStore
from shardkeep.testing import (
    Crashed,
    Fault,
    FaultyStore,
    Operation,
    fail_at,
    fail_randomly,
    faulty_store,
)
from support.store_files import names_in


def write(store: FaultyStore, name: str, *parts: bytes) -> None:
    with store.open_writer(name) as writer:
        for part in parts:
            writer.write(part)


def test_the_examples_of_the_documentation() -> None:
    assert doctest.testmod(faulty_store, optionflags=doctest.ELLIPSIS).failed == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_operation_fails_once_before_or_after_its_effect(when) -> None:
    store = FaultyStore(MemoryStore(), fail_at(1, Fault("error", when, errno.ENOSPC)))
    store.put("x", b"1", mode="create")
    with pytest.raises(OSError, match="No space left") as caught:
        store.put("x", b"2", mode="replace")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "x")
    assert store.get_range("x", 0, 9) == (b"2" if when == "after" else b"1")
    assert store.log == [("put", "x"), ("put", "x"), ("get_range", "x")]


@pytest.mark.parametrize("at", range(4))
def test_a_file_whose_writing_fails_is_not_there(at) -> None:
    store = FaultyStore(MemoryStore(), fail_at(at))
    with pytest.raises(OSError, match="Input/output error"):
        write(store, "x", b"1", b"2")
    assert names_in(store.inner) == []
    write(store, "x", b"1", b"2")
    assert store.inner.get_range("x", 0, 9) == b"12"


def test_after_a_crash_nothing_reaches_the_store() -> None:
    store = FaultyStore(MemoryStore(), fail_at(2, Fault("crash")))
    with pytest.raises(Crashed):
        write(store, "x", b"1", b"2")
    assert store.crashed
    assert store.inner.get_range("x", 0, 9) == b"1"  # what was written stays as it is
    for act in (lambda: store.delete("x"), store.sync, lambda: store.head("x")):
        with pytest.raises(Crashed):
            act()
    assert names_in(store.inner) == ["x"]


def outcomes(seed: int, threads: int) -> dict[str, str]:
    """What becomes of 60 files."""
    store = FaultyStore(MemoryStore(), fail_randomly(seed, error_rate=0.3, max_delay_seconds=1e-4))

    def put(number: int) -> tuple[str, str]:
        name = f"file {number}"
        try:
            store.put(name, b"1", mode="create")
        except OSError:
            return name, f"failed, {name in names_in(store.inner)}"
        return name, "done"

    with ThreadPoolExecutor(threads) as pool:
        return dict(pool.map(put, range(60)))


def test_random_faults_depend_on_the_seed_and_not_on_the_order_of_threads() -> None:
    once = outcomes(7, threads=1)
    assert outcomes(7, threads=8) == once
    assert outcomes(8, threads=1) != once
    assert set(once.values()) == {"done", "failed, True", "failed, False"}
    failed = sum(found != "done" for found in once.values())
    assert 8 <= failed <= 28


def test_a_repeated_operation_can_succeed() -> None:
    plan = fail_randomly(1, error_rate=0.5)
    found = {plan(Operation(0, "put", "x", repetition)) is None for repetition in range(20)}
    assert found == {True, False}


def test_delays(monkeypatch) -> None:
    waited = []
    monkeypatch.setattr(faulty_store.time, "sleep", waited.append)
    store = FaultyStore(MemoryStore(), fail_at(0, Fault("delay", delay_seconds=5.0)))
    store.put("x", b"1", mode="create")
    assert waited == [5.0]
    assert names_in(store) == ["x"]
