"""One process alone: no messages, no waiting."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from types import TracebackType

from shardkeep.coordination.contract import Ranks, Session, StopAgreement
from shardkeep.coordination.events import EventSender

__all__ = ["Solo"]


class Solo(Ranks):
    """The only rank there is."""

    rank = 0
    size = 1

    def session(self, work: str, path: str, *, events: EventSender | None = None) -> SoloSession:
        return SoloSession()

    def stop_agreement(self, path: str) -> SoloStopAgreement:
        return SoloStopAgreement()


class SoloSession(Session):
    """A session of one rank: it receives what it sends."""

    rank = 0
    size = 1

    def phase(self, name: str) -> None:
        """Do nothing: no other rank needs to know the phase."""

    def set_path(self, path: str) -> None:
        """Do nothing: errors of this rank are raised as they are, and name their own paths."""

    def check(self) -> None:
        """Do nothing: no other rank can fail."""

    def host(self, rank: int) -> str:
        return socket.gethostname()

    def ranks_on_this_host(self) -> int:
        return 1

    def gather(self, message: bytes) -> list[bytes]:
        return [message]

    def scatter(self, messages: Sequence[bytes] | None) -> bytes:
        if messages is None or len(messages) != 1:
            raise ValueError("the coordinator scatters one message to each rank: 1")
        return messages[0]

    def broadcast(self, message: bytes | None) -> bytes:
        if message is None:
            raise ValueError("the coordinator has no message to broadcast")
        return message

    def conclude(self) -> None:
        """Do nothing: no other rank waits for the end."""

    def __enter__(self) -> SoloSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Do nothing: no other rank needs to know of an error."""


class SoloStopAgreement(StopAgreement):
    """A stop agreement of one rank: it stops at the step after the request."""

    def __init__(self) -> None:
        self._requested = False
        self._step: int | None = None
        self._stops = False

    def request(self) -> None:
        self._requested = True

    def stops_at(self, step: int) -> bool:
        if step != self._step:
            self._step, self._stops, self._requested = step, self._requested, False
        return self._stops

    def close(self) -> None:
        """Do nothing: no other rank needs to know."""
