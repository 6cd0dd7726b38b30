"""What ranks ask each other before a save, and after each try to restore.

Each rank alone knows only what happened to itself. If one raised the failure of the save before
while another went on to the next save, that one would wait for it in vain.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from shardkeep.coordination.contract import Session
from shardkeep.errors import Conflict, RankFailed
from shardkeep.format.messages import columns

__all__ = ["Grade", "Worst", "take_turn", "worst"]


class Grade(IntEnum):
    """How it went on a rank, from good to bad."""

    FINE = 0
    TOLD = 1
    """It failed as another rank did."""
    UNREADABLE = 2
    """What is stored can't be read, or not as it was saved."""
    FATAL = 3
    """Anything else: another checkpoint would not help."""


@dataclass(frozen=True, slots=True)
class Worst:
    """How it went on the rank that it went worst on: the lowest of them, and its error."""

    grade: Grade
    rank: int
    host: str
    text: str

    def raised(self, phase: str, path: str) -> RankFailed:
        """What other ranks raise of it."""
        return RankFailed(self.rank, self.host, phase, path, self.text)


def take_turn(
    session: Session, step: int, *, busy: bool, failure: Callable[[], BaseException | None]
) -> Worst | None:
    """Agree on the next save.

    Args:
        step: what this rank is about to save.
        busy: on the coordinator, whether to leave this save out.
        failure: waits for the save before, and gives what is still to be raised of it. Asked only
            if this save is not left out.

    Returns:
        None if this save is left out; else how the one before went.

    Raises:
        Conflict: ranks are at different steps.
    """
    lead = session.rank == 0
    word = columns.pack({"step": step, "busy": busy}, {}) if lead else None
    said, _ = columns.unpack(session.broadcast(word))
    if said["step"] != step:
        raise Conflict(
            f"rank {session.rank} saves step {step}, and rank 0 step {said['step']}: "
            "all ranks save the same steps"
        )
    if said["busy"]:
        return None
    error = failure()
    return worst(session, Grade.FATAL if error else Grade.FINE, error)


def worst(session: Session, grade: Grade, error: BaseException | None) -> Worst:
    """How it went on the rank that it went worst on; the same answer on all ranks."""
    text = "" if error is None else f"{type(error).__name__}: {error}"
    told = session.gather(
        columns.pack({"grade": int(grade), "host": socket.gethostname(), "text": text}, {})
    )
    answer = None
    if told is not None:
        said = [columns.unpack(message)[0] for message in told]
        rank = max(range(len(said)), key=lambda rank: (said[rank]["grade"], -rank))
        answer = columns.pack({"rank": rank, **said[rank]}, {})
    found, _ = columns.unpack(session.broadcast(answer))
    return Worst(Grade(found["grade"]), found["rank"], found["host"], found["text"])
