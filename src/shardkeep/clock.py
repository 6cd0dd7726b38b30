"""Phases of a save or a load: what errors call them, and how long they took."""

from __future__ import annotations

import time
from collections.abc import Mapping

from shardkeep.contracts import Session

__all__ = ["Clock"]


class Clock:
    """Names the phase that a rank is in, and takes its time.

    Args:
        session: told of each phase, for errors.
        parts: phase -> what its time is added to; by default to its own.
    """

    def __init__(self, session: Session, parts: Mapping[str, str] | None = None) -> None:
        self._session = session
        self._parts = parts or {}
        self._name: str | None = None
        self._since = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def phase(self, name: str) -> None:
        """Begin a phase."""
        self.seconds()
        self._name = self._parts.get(name, name)
        self._session.phase(name)

    def seconds(self) -> dict[str, float]:
        """Phase -> seconds, up to now."""
        now = time.perf_counter()
        if self._name is not None:
            spent = self._seconds.get(self._name, 0.0) + now - self._since
            self._seconds[self._name] = spent
        self._since = now
        return dict(self._seconds)
