"""Coordination by collectives on a CPU group, for jobs without a key-value store (MPI).

Every call begins with a round in which each rank says whether it has failed, so the others raise a
failure in their current or next call. Collectives have limits: if one rank never comes, the others
wait until the group's own timeout, and sessions of several threads must not share a group.
"""

from __future__ import annotations

import socket
import traceback
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple

from shardkeep.coordination.contract import Ranks, Session
from shardkeep.coordination.events import EventSender, WaitingForRanks
from shardkeep.coordination.waiting import report_while_blocked
from shardkeep.errors import RankFailed

__all__ = ["GroupRanks"]


class GroupRanks(Ranks):
    """The ranks of a process group.

    Args:
        dist: the module `torch.distributed`.
        group: a group that moves CPU tensors; None is the default group.
    """

    def __init__(self, dist: Any, group: Any = None) -> None:
        self._dist, self._group = dist, group
        self._members = dist.get_process_group_ranks(group or dist.group.WORLD)

    @property
    def rank(self) -> int:
        return int(self._dist.get_rank(self._group))

    @property
    def size(self) -> int:
        return len(self._members)

    def session(self, work: str, path: str, *, events: EventSender | None = None) -> GroupSession:
        return GroupSession(self._dist, self._group, self._members, work, path, events=events)

    def stop_agreement(self, path: str) -> None:
        """Return None: without a store, only a collective at every step could find a request."""
        return None


class _RankStatus(NamedTuple):
    """What each rank tells the others at the beginning of a call."""

    rank: int
    host: str
    phase: str
    cause: str | None
    """The traceback of its error; None if it has not failed."""
    call: tuple[str, str, str]
    """The work, the path and the call, which must be the same on all ranks."""


class GroupSession(Session):
    """One rank's side of a session."""

    def __init__(
        self,
        dist: Any,
        group: Any,
        members: Sequence[int],
        work: str,
        path: str,
        *,
        events: EventSender | None = None,
    ) -> None:
        self._dist, self._group, self._members = dist, group, members
        self._rank = int(dist.get_rank(group))
        self._work, self._path = work, path
        self._events = events or EventSender(None, path=path, rank=members[self._rank])
        self._phase = "enter"
        self._over = False
        self._hosts: list[str] = []

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._members)

    def phase(self, name: str) -> None:
        self._phase = name

    def set_path(self, path: str) -> None:
        self._path = path

    def check(self) -> None:
        """Do nothing: failures of other ranks are found in the next round."""

    def host(self, rank: int) -> str:
        return self._hosts[rank]

    def ranks_on_this_host(self) -> int:
        return self._hosts.count(self._hosts[self._rank])

    def gather(self, message: bytes) -> list[bytes] | None:
        self._exchange_status("gather")
        out: list[Any] | None = None if self._rank else [None] * self.size
        self._dist.gather_object(message, out, dst=self._members[0], group=self._group)
        return out

    def scatter(self, messages: Sequence[bytes] | None) -> bytes:
        if not self._rank and (messages is None or len(messages) != self.size):
            raise ValueError(f"the coordinator scatters one message to each rank: {self.size}")
        self._exchange_status("scatter")
        out: list[Any] = [None]
        given = None if self._rank else list(messages or ())
        self._dist.scatter_object_list(out, given, src=self._members[0], group=self._group)
        return bytes(out[0])

    def broadcast(self, message: bytes | None) -> bytes:
        if not self._rank and message is None:
            raise ValueError("the coordinator has no message to broadcast")
        self._exchange_status("broadcast")
        box: list[Any] = [message]
        self._dist.broadcast_object_list(box, src=self._members[0], group=self._group)
        return bytes(box[0])

    def conclude(self) -> None:
        self._over = True

    def __enter__(self) -> GroupSession:
        self._exchange_status("enter")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._over:
            return
        if error is None:
            self._exchange_status("exit")
        else:
            # The others find this in the round of their next call.
            cause = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            # If a rank is gone, so is the connection to it. The error to raise is the first one.
            with suppress(RankFailed, RuntimeError):
                self._exchange_status("fail", cause)

    def _exchange_status(self, call: str, cause: str | None = None) -> None:
        """Tell the other ranks what this one is about to do, and learn the same from them.

        Raises:
            RankFailed: a rank has failed, or is about to do something else.
            RuntimeError: the collective failed, for example because a rank is gone.
        """
        wanted = (self._work, self._path, call)
        own = _RankStatus(self._rank, socket.gethostname(), self._phase, cause, wanted)
        statuses: list[Any] = [None] * self.size
        try:
            with report_while_blocked(self._report_waiting):
                self._dist.all_gather_object(statuses, own, group=self._group)
        except RuntimeError:
            self._over = True
            raise
        self._hosts = [status.host for status in statuses]
        failed = next((status for status in statuses if status.cause is not None), None)
        if failed is None:
            failed = next((status for status in statuses if status.call != statuses[0].call), None)
            if failed is not None:
                cause = f"it is at {failed.call}, and rank 0 at {statuses[0].call}"
        if failed is not None:
            self._over = True
            rank, text = self._members[failed.rank], failed.cause or cause or ""
            raise RankFailed(rank, failed.host, failed.phase, self._path, text)

    def _report_waiting(self, seconds: float) -> None:
        others = (member for rank, member in enumerate(self._members) if rank != self._rank)
        self._events(
            WaitingForRanks(
                path=self._path,
                work=self._work,
                waiting_for=tuple(others),
                phase=self._phase,
                reason="a collective call does not say which of them has not come",
                seconds=seconds,
            )
        )
