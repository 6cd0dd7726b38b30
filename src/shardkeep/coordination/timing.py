"""Phases of a save or a load: what errors call them, and how long they took."""

from __future__ import annotations

import time
from collections.abc import Mapping

from shardkeep.coordination.contract import Session
from shardkeep.format.messages import columns

__all__ = ["Clock", "slowest"]


class Clock:
    """Names the phase that a rank is in, and takes its time.

    Args:
        session: told of each phase, for errors.
        parts: phase -> the name that its seconds are reported under; by default its own.
    """

    def __init__(self, session: Session, parts: Mapping[str, str] | None = None) -> None:
        self._session = session
        self._parts = parts or {}
        self._name: str | None = None
        self._since = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def phase(self, name: str) -> None:
        """Begin a phase."""
        self.part(self._parts.get(name, name))
        self._session.phase(name)

    def part(self, name: str) -> None:
        """Go on in the same phase, with its seconds reported under this name from now on."""
        self.seconds()
        self._name = name

    def seconds(self) -> dict[str, float]:
        """Name -> seconds, up to now."""
        now = time.perf_counter()
        if self._name is not None:
            spent = self._seconds.get(self._name, 0.0) + now - self._since
            self._seconds[self._name] = spent
        self._since = now
        return dict(self._seconds)


def slowest(session: Session, seconds: float) -> tuple[int, float]:
    """The rank that took the longest, and how long; all ranks learn it."""
    told = session.gather(columns.pack({"seconds": seconds}, {}))
    answer = None
    if told is not None:
        every = [columns.unpack(message)[0]["seconds"] for message in told]
        rank = max(range(len(every)), key=every.__getitem__)
        answer = columns.pack({"rank": rank, "seconds": every[rank]}, {})
    found, _ = columns.unpack(session.broadcast(answer))
    return found["rank"], found["seconds"]
