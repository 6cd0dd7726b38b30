"""One process alone: no messages, no waiting."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from types import TracebackType

from shardkeep.coordination.contract import Ranks, Session
from shardkeep.coordination.keyvalue.stop_agreement import Alone

__all__ = ["Solo"]


class Solo(Ranks):
    """The only rank there is."""

    rank = 0
    size = 1

    def session(self, work: str, path: str) -> SoloSession:
        return SoloSession()

    def meeting(self, path: str) -> Alone:
        return Alone()


class SoloSession(Session):
    """A session with nobody else: what is sent is what arrives."""

    rank = 0
    size = 1

    def phase(self, name: str) -> None:
        """Errors of this rank are raised as they are: no one else needs to know the phase."""

    def set_path(self, path: str) -> None:
        """Errors of this rank are raised as they are, and name their own paths."""

    def check(self) -> None:
        """Nobody else can fail."""

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
        """Nobody else waits for the end."""

    def __enter__(self) -> SoloSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nobody to tell."""
