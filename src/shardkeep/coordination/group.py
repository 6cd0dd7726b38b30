"""Through collectives on a CPU group, for jobs without a store (MPI).

Every call begins with a round in which each rank says whether it is well, so a failure is raised by
the others in their current or next call. What collectives cannot do: one rank that never comes
makes the others wait as long as the group's own timeout; sessions of several threads must not
share a group.
"""

from __future__ import annotations

import socket
import traceback
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from shardkeep.coordination.contract import Ranks, Session
from shardkeep.errors import RankFailed

__all__ = ["GroupRanks"]


class GroupRanks(Ranks):
    """The ranks of a process group.

    Args:
        dist: the module `torch.distributed`.
        group: a group that moves CPU tensors; None is the default one.
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

    def session(self, work: str, path: str) -> GroupSession:
        return GroupSession(self._dist, self._group, self._members, work, path)

    def meeting(self, path: str) -> None:
        """Without a store, only a collective at every step could tell what one rank asks for."""
        return None


class GroupSession(Session):
    """One rank's end of a session; see the module."""

    def __init__(self, dist: Any, group: Any, members: Sequence[int], work: str, path: str) -> None:
        self._dist, self._group, self._members = dist, group, members
        self._rank = int(dist.get_rank(group))
        self._work, self._path = work, path
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
        """Nothing is known between two rounds."""

    def host(self, rank: int) -> str:
        return self._hosts[rank]

    def ranks_on_this_host(self) -> int:
        return self._hosts.count(self._hosts[self._rank])

    def gather(self, message: bytes) -> list[bytes] | None:
        self._round("gather")
        out: list[Any] | None = None if self._rank else [None] * self.size
        self._dist.gather_object(message, out, dst=self._members[0], group=self._group)
        return out

    def scatter(self, messages: Sequence[bytes] | None) -> bytes:
        if not self._rank and (messages is None or len(messages) != self.size):
            raise ValueError(f"the coordinator scatters one message to each rank: {self.size}")
        self._round("scatter")
        out: list[Any] = [None]
        given = None if self._rank else list(messages or ())
        self._dist.scatter_object_list(out, given, src=self._members[0], group=self._group)
        return bytes(out[0])

    def broadcast(self, message: bytes | None) -> bytes:
        if not self._rank and message is None:
            raise ValueError("the coordinator has no message to broadcast")
        self._round("broadcast")
        box: list[Any] = [message]
        self._dist.broadcast_object_list(box, src=self._members[0], group=self._group)
        return bytes(box[0])

    def conclude(self) -> None:
        self._over = True

    def __enter__(self) -> GroupSession:
        self._round("enter")
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
            self._round("exit")
        else:
            # The others meet this in the round of their next call.
            cause = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            # Where one is gone already, so is its connection: the error stays what it was.
            with suppress(RankFailed, RuntimeError):
                self._round("fail", cause)

    def _round(self, call: str, cause: str | None = None) -> None:
        """All say what they are about to do; raises if one fails, or does something else."""
        own = (self._rank, socket.gethostname(), self._phase, cause, self._work, self._path, call)
        told: list[Any] = [None] * self.size
        try:
            self._dist.all_gather_object(told, own, group=self._group)
        except RuntimeError:
            self._over = True
            raise
        self._hosts = [said[1] for said in told]
        failed = [said for said in told if said[3] is not None]
        if not failed:
            failed = [said for said in told if said[4:] != told[0][4:]]
            cause = f"it is at {failed[0][4:]}, and rank 0 at {told[0][4:]}" if failed else None
        if failed:
            self._over = True
            rank, host, phase, known, *_ = failed[0]
            raise RankFailed(self._members[rank], host, phase, self._path, known or cause or "")
