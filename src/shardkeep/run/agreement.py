"""What the ranks of a run agree on before a save, and after each attempt to restore.

A rank alone knows only what happened to itself. If one rank raised the failure of the previous save
while another one began the next save, the second rank would wait for the first one in vain.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from shardkeep.coordination.contract import Session
from shardkeep.errors import Conflict, RankFailed
from shardkeep.format.messages import columns

__all__ = ["Outcome", "SaveDecision", "SaveProposal", "Severity", "agree_on_save", "worst_outcome"]


class Severity(IntEnum):
    """How badly the work of a rank ended, in ascending order."""

    SUCCESS = 0
    OTHER_RANK = 1
    """It failed because another rank failed."""
    UNREADABLE = 2
    """The checkpoint cannot be read, or differs from what was saved."""
    FATAL = 3
    """Any other error: another checkpoint would not help."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the work ended on one rank, as other ranks know it.

    Attributes:
        severity: how badly it ended.
        rank: the rank.
        host: the name of its host.
        error: the class and message of its exception; empty without one.
    """

    severity: Severity
    rank: int
    host: str
    error: str

    def rank_failed(self, phase: str, path: str) -> RankFailed:
        """Return the exception that other ranks raise for it."""
        return RankFailed(self.rank, self.host, phase, path, self.error)


@dataclass(frozen=True, slots=True)
class SaveProposal:
    """What one rank knows before a save.

    Attributes:
        step: the step that it is asked to save.
        busy: whether its previous save is still under way.
        stops_on_failure: whether it raises a failure of its previous save instead of saving.
        error: the failure of its previous save, if the caller does not know of it yet.
    """

    step: int
    busy: bool
    stops_on_failure: bool
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class SaveDecision:
    """What all ranks do about a save. It is the same on all of them.

    Attributes:
        skip: leave this save out, because the previous one is still under way on some rank.
        stop: raise the failure of the previous save, and leave this one out.
        previous: how the previous save ended on the rank where it ended worst.
    """

    skip: bool
    stop: bool
    previous: Outcome


def agree_on_save(session: Session, proposal: SaveProposal) -> SaveDecision:
    """Decide with all ranks whether the next save is made. Costs two messages for each rank.

    Raises:
        Conflict: this rank is at another step than the coordinator.
    """
    messages = session.gather(
        columns.pack(
            {
                "step": proposal.step,
                "busy": proposal.busy,
                "stops": proposal.stops_on_failure,
                **_outcome_fields(Severity.FATAL if proposal.error else Severity.SUCCESS)
                | _error_fields(proposal.error),
            },
            {},
        )
    )
    answer = None
    if messages is not None:
        fields = _unpacked(messages)
        worst = _worst(fields)
        failed = worst["severity"] > Severity.SUCCESS
        skip = any(rank["busy"] for rank in fields)
        stop = not skip and failed and any(rank["stops"] for rank in fields)
        answer = columns.pack({**worst, "step": fields[0]["step"], "skip": skip, "stop": stop}, {})
    decided, _ = columns.unpack(session.broadcast(answer))
    if decided["step"] != proposal.step:
        raise Conflict(
            f"rank {session.rank} saves step {proposal.step}, but rank 0 saves step "
            f"{decided['step']}: all ranks must save the same steps in the same order"
        )
    return SaveDecision(decided["skip"], decided["stop"], _outcome(decided))


def worst_outcome(session: Session, severity: Severity, error: BaseException | None) -> Outcome:
    """Return the outcome of the rank whose work ended worst. It is the same on all ranks."""
    fields = _outcome_fields(severity) | _error_fields(error)
    messages = session.gather(columns.pack(fields, {}))
    answer = None if messages is None else columns.pack(_worst(_unpacked(messages)), {})
    found, _ = columns.unpack(session.broadcast(answer))
    return _outcome(found)


def _outcome_fields(severity: Severity) -> dict[str, Any]:
    return {"severity": int(severity), "host": socket.gethostname()}


def _error_fields(error: BaseException | None) -> dict[str, Any]:
    return {"error": "" if error is None else f"{type(error).__name__}: {error}"}


def _unpacked(messages: list[bytes]) -> list[dict[str, Any]]:
    return [columns.unpack(message)[0] for message in messages]


def _worst(fields: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields of the rank whose work ended worst, the lowest one of several, and its number."""
    rank = max(range(len(fields)), key=lambda rank: (fields[rank]["severity"], -rank))
    return {"rank": rank, **fields[rank]}


def _outcome(fields: dict[str, Any]) -> Outcome:
    return Outcome(Severity(fields["severity"]), fields["rank"], fields["host"], fields["error"])
