"""One rank of a job that only saves, until it is killed."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

import shardkeep as sk
from crash.notes import PHASES, Notes, Outcome
from crash.plans import Plan
from crash.state import RANKS, state
from shardkeep.coordination.contract import Ranks
from shardkeep.coordination.keyvalue.ranks import KeyValueRanks
from shardkeep.coordination.keyvalue.session import KeyValueSession
from shardkeep.coordination.keyvalue.torch_store import TorchKeyValueStore
from shardkeep.engine.async_save import async_save
from shardkeep.engine.save import save as save_now
from shardkeep.stores import LocalStore

__all__ = ["KEPT", "SAVES", "SPANS", "run"]

SPANS = "spans.json"

_SET_PARENT_DEATH_SIGNAL = 1  # of prctl(2)

KEPT = 2
"""The number of steps that a manager keeps."""

SAVES = 4
"""The number of saves of a job that is not killed."""


def run(rank: int, plan: Plan, notes: Notes, first: int) -> None:
    """Save steps `first`, `first` + 1, ...; never return.

    The process is a fork of one that has imported everything.
    """
    if sys.platform == "linux":  # the rank ends with the process that counts the moments
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    logging.disable()  # failures are counted instead
    outcome = Outcome.OTHER
    try:
        _Rank(rank, plan, notes).run(first)
        outcome = Outcome.FINISHED
    except sk.RankFailed:
        outcome = Outcome.RANK_FAILED
    except BaseException:
        traceback.print_exc()
    notes.put(rank, "outcome", outcome)
    os._exit(0)


class _Rank:
    def __init__(self, rank: int, plan: Plan, notes: Notes) -> None:
        self.rank, self.plan, self.notes = rank, plan, notes
        self.number = 0
        self.armed = plan.rank != rank or plan.whom == "none"
        self.spent: dict[str, list[float]] = {}
        self.phase, self.since = "start", time.monotonic()

    def run(self, first: int) -> None:
        is_host = self.rank == 0
        store = dist.TCPStore(
            "127.0.0.1",
            0 if is_host else self.notes.port,
            is_master=is_host,
            wait_for_workers=False,
            timeout=timedelta(seconds=10),
        )
        if is_host:
            self.notes.port = store.port
        ranks = KeyValueRanks(TorchKeyValueStore(store, RANKS), self.rank, range(RANKS))
        self.notes.put(self.rank, "ready", 1)
        while not all(
            self.notes.every("ready")
        ):  # a rank that still connects would wait for a dead host
            time.sleep(0.001)
        self.watch()
        if self.plan.phase is None:
            self.arm()
        save, finish = _SAVES[self.plan.mode](self.plan.folder, ranks, self.note)
        for step in range(first, first + SAVES):
            self.number += 1
            self.notes.put(self.rank, "begun", step)
            self.note("between")
            save(step, state(step, self.rank))
            self.notes.put(self.rank, "done", step)
        self.note("between")
        finish()
        if self.plan.whom == "none" and is_host:
            self.write_spans()

    def write_spans(self) -> None:
        """Write how long each phase and the whole job took."""
        spans = {phase: max(some) for phase, some in self.spent.items()}
        spans["life"] = sum(map(sum, self.spent.values()))
        (self.plan.folder / SPANS).write_text(json.dumps(spans))

    def note(self, phase: str) -> None:
        """Note that a phase begins; if it is the one of the plan, start the clock of the kill."""
        now = time.monotonic()
        self.spent.setdefault(self.phase, []).append(now - self.since)
        self.phase, self.since = phase, now
        if phase in PHASES:
            self.notes.put(self.rank, "phase", PHASES.index(phase))
        if (self.number, phase) == (self.plan.save, self.plan.phase):
            self.arm()

    def arm(self) -> None:
        if not self.armed:
            self.armed = True
            threading.Thread(target=self._kill_after_delay, daemon=True).start()

    def _kill_after_delay(self) -> None:
        time.sleep(self.plan.delay)
        if self.plan.whom == "all":
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Patch the session so that it notes its phases, in this process only."""
        enter, phase, leave = (
            KeyValueSession.__enter__,
            KeyValueSession.phase,
            KeyValueSession.__exit__,
        )

        def entering(session: Any) -> Any:
            self.note("enter")
            return enter(session)

        def begin(session: Any, name: str) -> Any:
            self.note(name)
            return phase(session, name)

        def leaving(session: Any, *error: Any) -> Any:
            self.note("part")
            return leave(session, *error)

        KeyValueSession.__enter__ = entering  # type: ignore[method-assign]
        KeyValueSession.phase = begin  # type: ignore[method-assign]
        KeyValueSession.__exit__ = leaving  # type: ignore[method-assign]


class _Watched(LocalStore):
    """A local store that notes what the coordinator does to files."""

    def __init__(self, path: str | Path, note: Callable[[str], None]) -> None:
        super().__init__(path)
        self._note = note

    def open_writer(self, name: str) -> Any:
        if name.startswith(".manifest-"):
            self._note("manifest")
        return super().open_writer(name)

    def put(self, name: str, data: Any, *, mode: Any) -> None:
        self._note("lease" if name.startswith(".lease_") else "publish")
        super().put(name, data, mode=mode)

    def delete(self, name: str) -> None:
        self._note("clean")
        super().delete(name)

    def subfolder(self, folder: str) -> _Watched:
        return _Watched(self.path_of(folder), self._note)


Note = Callable[[str], None]
Save = Callable[[int, dict[str, Any]], None]
Saving = tuple[Save, Callable[[], None]]
"""A function that saves a step, and one that waits for the end of all saves."""


def _sync(folder: Path, ranks: Ranks, note: Note) -> Saving:
    def save(step: int, what: dict[str, Any]) -> None:
        save_now(what, _Watched(folder / f"step_{step}", note), ranks=ranks)

    return save, lambda: None


def _async(folder: Path, ranks: Ranks, note: Note) -> Saving:
    def save(step: int, what: dict[str, Any]) -> None:
        handle = async_save(what, _Watched(folder / f"step_{step}", note), ranks=ranks)
        what["shared"]["weight"].zero_()  # training goes on
        handle.result()

    return save, lambda: None


def _overwrite(folder: Path, ranks: Ranks, note: Note) -> Saving:
    def save(step: int, what: dict[str, Any]) -> None:
        store = _Watched(folder / "last", note)
        save_now(what, store, overwrite=True, ranks=ranks)

    return save, lambda: None


def _manager(folder: Path, ranks: Ranks, note: Note) -> Saving:
    manager = sk.Manager(_Watched(folder, note), keep=sk.KeepLast(KEPT), ranks=ranks)

    def save(step: int, what: dict[str, Any]) -> None:
        handle = manager.save(step, what)
        what["shared"]["weight"].zero_()  # training goes on
        handle.result()

    return save, manager.wait


_SAVES = {"sync": _sync, "async": _async, "overwrite": _overwrite, "manager": _manager}
