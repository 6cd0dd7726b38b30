"""Shared memory in which ranks note their progress, and which outlives them."""

from __future__ import annotations

import mmap
import time
from enum import IntEnum

import numpy as np

__all__ = ["PHASES", "Notes", "Outcome"]

PHASES = (
    "start between enter describe own lease stage write sync report manifest publish clean part"
).split()
"""The phases in the order of a save. "between" is the time between two saves; "part" lasts until
all ranks have left the session.
"""

_FIELDS = ("phase", "ready", "begun", "done", "outcome")


class Outcome(IntEnum):
    """How a rank ended."""

    NONE = 0
    """It was killed, or it hangs."""
    FINISHED = 1
    RANK_FAILED = 2
    """It raised `RankFailed`."""
    OTHER = 3


class Notes:
    """A memory page that forked processes share: a row per rank, and the port of their store."""

    def __init__(self, ranks: int) -> None:
        memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._all = np.frombuffer(memory, dtype=np.int64)
        self._rows = self._all[1 : 1 + ranks * len(_FIELDS)].reshape(ranks, len(_FIELDS))

    def clear(self) -> None:
        self._all[:] = 0

    def put(self, rank: int, field: str, value: int) -> None:
        self._rows[rank, _FIELDS.index(field)] = value

    def get(self, rank: int, field: str) -> int:
        return int(self._rows[rank, _FIELDS.index(field)])

    def every(self, field: str) -> list[int]:
        return [int(value) for value in self._rows[:, _FIELDS.index(field)]]

    @property
    def port(self) -> int:
        """The port of the key-value store, once rank 0 has set it."""
        while not self._all[0]:
            time.sleep(0.001)
        return int(self._all[0])

    @port.setter
    def port(self, value: int) -> None:
        self._all[0] = value
