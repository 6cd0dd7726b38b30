"""Errors of single store operations and their effect on saves: a table in docs/reliability.md."""

from __future__ import annotations

import errno
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

import shardkeep as sk
from shardkeep.coordination.timing import Clock
from shardkeep.stores import MemoryStore
from support.faults import FaultyStore
from support.store_files import names_in

__all__ = ["ERRORS", "KINDS", "rows", "section"]

ERRORS = ["ENOSPC", "EIO", "EACCES", "EROFS", "ENOENT"]
KINDS = ["new", "over", "async", "manager"]

Files = dict[str, bytes]


class Fault(NamedTuple):
    """An operation that fails: kind of save, number (from 0), before or after its effect."""

    kind: str
    at: int
    phase: str
    what: str
    of: str
    when: str


class Phased(FaultyStore):
    """A store that notes the phase of each operation."""

    def __init__(self, inner: MemoryStore, at: int = -1, **how: Any) -> None:
        super().__init__(inner, at, **how)
        self.phase, self.phases = "enter", list[str]()

    def run(self, method: str, name: str, act: Callable[[], Any]) -> Any:
        self.phases.append(self.phase)
        found = super().run(method, name, act)
        if method == "put" and name.endswith(".metadata"):
            self.phase = "after"
        return found


def state(seed: float) -> dict[str, Any]:
    return {"w": torch.arange(100.0) + seed, "odd": {"set", seed}, "n": seed}


def save(kind: str, store: Any, seed: int) -> None:
    """Save once; by a manager, save a step and keep only that one."""
    if kind == "manager":
        with sk.Manager(store, keep=sk.KeepLast(1)) as manager:
            manager.save(seed, state(seed)).result(60)
    elif kind == "async":
        sk.async_save(state(seed), store, overwrite=True).result(60)
    else:
        sk.save(state(seed), store, overwrite=kind == "over")


def files_of(store: MemoryStore) -> Files:
    return {name: store.get_range(name, 0, store.head(name).size) for name in names_in(store)}


def seed_in(kind: str, store: MemoryStore) -> float:
    """Return the content of the newest checkpoint, after checking that all are whole."""
    stores = [store]
    if kind == "manager":
        manager = sk.Manager(store)
        stores = [manager.store(step) for step in manager.steps()]
    found = 0.0
    for one in stores:
        try:
            ckpt = sk.open(one)
        except sk.NotACheckpoint:
            continue
        found = ckpt["n"].value
        assert ckpt.verify().ok and (ckpt.read("w") == state(found)["w"].numpy()).all()
    return found


@cache
def _begun(kind: str) -> Files:
    """Create the state before the save under test."""
    store = MemoryStore()
    if kind != "new":
        save(kind, store, 1)
    return files_of(store)


def _copy(files: Files) -> MemoryStore:
    store = MemoryStore()
    for name, data in files.items():
        store.put(name, data, mode="replace")
    return store


def _tried(kind: str, before: Files, at: int = -1, **how: Any) -> tuple[Phased, Exception | None]:
    """Run a save, with an error or without; return its operations and what it raised."""
    store, begin = Phased(_copy(before), at, **how), Clock.phase

    def phase(clock: Clock, name: str) -> None:
        begin(clock, name)
        store.phase = name

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(Clock, "phase", phase)
        patch.setenv("SHARDKEEP_WRITE_THREADS", "1")
        try:
            save(kind, store, 2)
        except (OSError, sk.ShardkeepError) as error:
            return store, error
    return store, None


def faults(kind: str) -> Iterator[Fault]:
    """Return all operations of a save of this kind."""
    before = _begun(kind)
    store, error = _tried(kind, before)
    assert error is None
    ours = [name for name in names_in(store.inner) if name not in before]
    assert len(ours) >= 2
    for at, (phase, (what, name)) in enumerate(zip(store.phases, store.log, strict=True)):
        for when in ("before", "after") if what not in _LOOKS else ("before",):
            yield Fault(kind, at, phase, what, _shown(name, before), when)


_LOOKS = ("list", "head", "get_range", "read_into")
"""Operations without an effect after which an error could come."""


def _shown(name: str, before: Files) -> str:
    """Return a short description of a file."""
    found = re.search(r"\.metadata|\.lease|\.manifest|distcp", name)
    if found is None:
        return "folder"
    word = {".lease": "lease", ".manifest": "manifest", "distcp": "data"}.get(found[0], found[0])
    return f"old {word}" if name in before else word


def outcome(fault: Fault, error: str) -> str:
    """Return the result as a word of the page; check that a save afterwards works."""
    before = _begun(fault.kind)
    number = getattr(errno, error)
    store, raised = _tried(fault.kind, before, fault.at, when=fault.when, error=number)
    after, seed = files_of(store.inner), seed_in(fault.kind, store.inner)
    save("over" if fault.kind == "new" else fault.kind, store.inner, 3)
    assert seed_in(fault.kind, store.inner) == 3
    if raised is None:
        assert seed == 2, (fault, error)
        return "saved" if not any(map(_left_behind(before), after)) else "kept"
    assert isinstance(raised, sk.ShardkeepError) or raised.errno == number, (fault, raised)
    if seed == 2:
        return "new"
    assert seed == bool(before), (fault, error)
    assert after == before, (fault, error)  # no file of the save is left
    return "refused"


def _left_behind(before: Files) -> Callable[[str], bool]:
    return lambda name: ".lease" in name or (name in before and name != ".metadata")


_HEAD = """The same with a store that fails (`tests/support/faults.py`), in saves by one rank: each
operation of a save fails in turn, before or after it takes effect, as over a network. The results
are those described above. Where a row stands for several operations, it lists all their results.
"""


def rows(kind: str, errors: Sequence[str] = ERRORS) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table for one kind of save, with a cell per error."""
    same: dict[tuple[str, ...], dict[str, list[Fault]]] = {}
    for fault in faults(kind):
        key = kind, fault.phase, fault.what, fault.of
        same.setdefault(key, {}).setdefault(fault.when, []).append(fault)
    for key, whens in same.items():
        ends: dict[tuple[str, ...], list[str]] = {}
        for when, some in whens.items():
            cells = (dict.fromkeys(outcome(one, error) for one in some) for error in errors)
            ends.setdefault(tuple(" / ".join(cell) for cell in cells), []).append(when)
        for found, when in ends.items():
            yield (*key, ", ".join(when), *found)


def section() -> Iterator[str]:
    """Yield the lines of the table and the text before it."""
    yield _HEAD
    yield f"| Save | Phase | Operation | of the | Error comes | {' | '.join(ERRORS)} |"
    yield "|---" * (5 + len(ERRORS)) + "|"
    for kind in KINDS:
        for row in rows(kind):
            yield f"| {' | '.join(row)} |"
