"""Phases of a save or a load: their names in errors, and how long they took."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from shardkeep.coordination.contract import Session
from shardkeep.format.messages import columns

__all__ = ["Clock", "slowest", "slowest_of"]


class Clock:
    """Names the phase that a rank is in, and measures how long each phase takes.

    Args:
        session: gets the name of each phase, for the errors of other ranks.
        reported_names: phase -> the name that its seconds are reported under. The default is the
            name of the phase.
    """

    def __init__(self, session: Session, reported_names: Mapping[str, str] | None = None) -> None:
        self._session = session
        self._reported_names = reported_names or {}
        self._name: str | None = None
        self._since = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def phase(self, name: str) -> None:
        """Begin a phase."""
        self.part(self._reported_names.get(name, name))
        self._session.phase(name)

    def part(self, name: str) -> None:
        """Report the seconds from now on under another name, in the same phase."""
        self.seconds()
        self._name = name

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase up to now, by reported name."""
        now = time.perf_counter()
        if self._name is not None:
            spent = self._seconds.get(self._name, 0.0) + now - self._since
            self._seconds[self._name] = spent
        self._since = now
        return dict(self._seconds)


def slowest_of(seconds: Sequence[float]) -> tuple[int, float]:
    """Return the rank that took longest, and how long, from the seconds of all ranks."""
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    return rank, seconds[rank]


def slowest(session: Session, seconds: float) -> tuple[int, float]:
    """Return the rank that took longest, and how long, on all ranks.

    It costs a gather and a broadcast. Where a message is sent anyway, append the seconds to it and
    use `slowest_of`.
    """
    messages = session.gather(columns.pack({"seconds": seconds}, {}))
    answer = None
    if messages is not None:
        rank, most = slowest_of([columns.unpack(message)[0]["seconds"] for message in messages])
        answer = columns.pack({"rank": rank, "seconds": most}, {})
    found, _ = columns.unpack(session.broadcast(answer))
    return found["rank"], found["seconds"]
