"""Scenarios of sessions, for simulated and for real ranks."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from shardkeep.coordination.contract import Ranks, Session
from shardkeep.errors import RankFailed

PHASES = ["describe", "assign", "write", "report", "commit", "leave"]


@lru_cache(maxsize=64)
def payload(seed: int, size: int) -> bytes:
    """Return random bytes and as many zeros: half of the payload can be compressed."""
    return random.Random(seed).randbytes(size // 2) + bytes(size - size // 2)


def talk(session: Session, size: int) -> None:
    """Make one call of each kind and compare every byte."""
    rank, count = session.rank, session.size
    gathered = session.gather(payload(rank, size))
    assert gathered == (None if rank else [payload(r, size) for r in range(count)])
    given = None if rank else [payload(100 + r, size) for r in range(count)]
    assert session.scatter(given) == payload(100 + rank, size)
    assert session.broadcast(None if rank else payload(7, size)) == payload(7, size)


def conversation(ranks: Ranks, sizes: list[int]) -> str:
    with ranks.session("save", "run/step") as session:
        assert (session.rank, session.size) == (ranks.rank, ranks.size)
        for size in sizes:
            talk(session, size)
    return "done"


def work(session: Session, step: Callable[[str], None]) -> None:
    """Make the calls of a save; call `step(phase)` at the start of each phase."""

    def enter(phase: str) -> None:
        session.phase(phase)
        step(phase)

    first = session.rank == 0
    enter("describe")
    session.gather(b"digest")
    enter("assign")
    session.scatter([b"yours"] * session.size if first else None)
    enter("write")
    enter("report")
    session.gather(b"columns")
    enter("commit")
    session.broadcast(b"committed" if first else None)
    enter("leave")


def outcome(ranks: Ranks, step: Callable[[str], None], path: str = "run/step") -> dict[str, Any]:
    """Return how a save ended on this rank."""
    began = time.monotonic()
    try:
        with ranks.session("save", path) as session:
            work(session, step)
    except RankFailed as error:
        end = {"rank": error.rank, "phase": error.phase, "cause": error.cause, "host": error.host}
        return {"end": "told", "path": error.path, **end, "took": time.monotonic() - began}
    except ValueError as error:
        return {"end": "raised", "message": str(error), "took": time.monotonic() - began}
    return {"end": "done", "took": time.monotonic() - began}


def failure(
    ranks: Ranks, culprit: int, phases: Sequence[str] = PHASES
) -> list[list[dict[str, Any]]]:
    """Raise an error on one rank in each phase in turn, then hold another session on the path."""

    def one(where: str) -> list[dict[str, Any]]:
        def step(phase: str) -> None:
            if phase == where and ranks.rank == culprit:
                raise ValueError("boom")

        return [outcome(ranks, step), outcome(ranks, nothing)]

    return [one(where) for where in phases]


def until_done(ranks: Ranks) -> str:
    """Repeat a session until it succeeds, as tiny deadlines can be missed on a busy machine."""
    for _ in range(30):
        if (end := outcome(ranks, nothing)["end"]) == "done":
            return end
    return "never done"


def absence(ranks: Ranks, culprit: int, seconds: float) -> tuple[dict[str, Any] | None, str]:
    """Leave out one session on one rank; all ranks take part in a later one."""
    if ranks.rank == culprit:
        time.sleep(seconds)
        return None, until_done(ranks)
    return outcome(ranks, nothing), until_done(ranks)


def lateness(ranks: Ranks, culprit: int, where: str, seconds: float) -> tuple[dict[str, Any], str]:
    """Delay one rank in a phase beyond the others' deadline; all take part in a later session."""

    def step(phase: str) -> None:
        if phase == where and ranks.rank == culprit:
            time.sleep(seconds)

    return outcome(ranks, step), until_done(ranks)


def strangers(ranks: Ranks) -> dict[str, Any]:
    """Hold a session for which the last rank has another path."""
    return outcome(ranks, nothing, "run/b" if ranks.rank == ranks.size - 1 else "run/a")


def parallel(ranks: Ranks, count: int) -> list[str]:
    """Hold sessions on several paths at the same time, one of which fails."""

    def one(number: int) -> str:
        def step(phase: str) -> None:
            time.sleep(0.005 * ((number + ranks.rank) % 3))
            if number == 1 and ranks.rank == 2 and phase == "report":
                raise ValueError("boom")

        return outcome(ranks, step, f"run/{number}")["end"]

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def nothing(phase: str) -> None:
    """Do nothing, for phases without a failure."""


@contextmanager
def training() -> Iterator[list[int]]:
    """Run collectives in another thread on the default group; yield their number in a list.

    They are reductions of a flag, not barriers, so that the threads of all ranks stop after the
    same one.
    """
    import torch
    from torch import distributed as dist

    stop, rounds = threading.Event(), [0]

    def loop() -> None:
        while True:
            flag = torch.tensor([int(stop.is_set())])
            dist.all_reduce(flag, op=dist.ReduceOp.MIN)
            dist.barrier()
            rounds[0] += 1
            time.sleep(0.002)  # As if training computed in between.
            if flag.item():
                return

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield rounds
    finally:
        stop.set()
        thread.join(30)


# --- stop agreements -----------------------------------------------------------------------------


def stops(
    ranks: Ranks, rounds: int, seed: int, asking: Sequence[int], collective: bool
) -> list[tuple[int, int]]:
    """Return (step of the stop, step of this rank's request or -1) for each round of an agreement.

    Args:
        collective: whether every step has a collective, so that no rank completes a step before all
            ranks have begun it. Without it, ranks drift apart, as each step takes a random time.
        asking: the ranks that request a stop.
    """
    agreement = ranks.stop_agreement("run")
    assert agreement is not None
    chance, found, step = random.Random(f"{seed} {ranks.rank}"), [], 0
    for _ in range(rounds):
        asks, asked = step + chance.randrange(1, 12), -1
        while True:
            step += 1
            time.sleep(chance.random() * 0.01)
            if collective:
                with ranks.session("collective", f"{step}") as session:
                    session.broadcast(None if session.rank else b"")
            if step == asks and ranks.rank in asking:
                agreement.request()
                asked = step
            stop = agreement.stops_at(step)
            assert agreement.stops_at(step) == stop
            if stop:
                break
            assert step < 10_000
        found.append((step, asked))
    agreement.close()
    return found


def asked_and_left(ranks: Ranks, leaver: int) -> int:
    """Close one rank's agreement after three steps, then request a stop on the others.

    Returns:
        The number of steps that this rank made.
    """
    agreement = ranks.stop_agreement("run")
    assert agreement is not None
    for step in range(3):
        assert not agreement.stops_at(step)
    if ranks.rank == leaver:
        agreement.close()
        return 3
    time.sleep(0.5)
    agreement.request()
    for step in range(3, 60):
        time.sleep(0.01)
        assert not agreement.stops_at(step)
    agreement.close()
    return 60


def nobody_answers(ranks: Ranks, silent: int) -> dict[str, Any] | None:
    """Silence the thread of one rank; return the error that the other ranks raise."""
    agreement: Any = ranks.stop_agreement("run")
    if ranks.rank == silent:
        agreement._participant._run = lambda transport: None
    try:
        agreement.stops_at(0)  # Another rank may have requested a stop already.
        agreement.request()
        for step in range(1, 40):
            time.sleep(0.02)
            if ranks.rank != silent:
                agreement.stops_at(step)
    except RankFailed as error:
        return {"rank": error.rank, "text": str(error)}
    finally:
        agreement.close()
    return None
