"""How ranks enter a session.

Each rank posts a request with a random token, and its host, under a key made of scope, members,
work and path. The coordinator makes a random id for the session and answers each request with it.
All further keys begin with that id. So nothing is counted: a session that some ranks never entered,
or that failed half-way on some of them, leaves nothing that a later one could mistake for its own.

- A request is written and removed only by its rank. It is answered under a key of its own, so a
  rank that comes again never reads the answer to its earlier request.
- The first heartbeat of an answered rank says that it has entered.
- If the session fails before a slower rank has come, the coordinator leaves the failure under a
  `missed` key, so that the slower rank does not wait for those who are gone.
"""

from __future__ import annotations

import json
from collections import Counter
from secrets import token_hex
from time import monotonic
from typing import NamedTuple

from shardkeep.coordination.keyvalue.peers import UNKNOWN_HOST, Peers
from shardkeep.coordination.waiting import LongWait
from shardkeep.errors import RankFailed

__all__ = ["Admission", "enter"]

_RECHECK_SECONDS = 1.0
"""Interval at which the coordinator looks which other ranks have come, or have come again."""
_EXTRA_SECONDS = 0.5
"""By how much other ranks wait longer than the coordinator."""


def enter(peers: Peers) -> None:
    """Enter the session of the coordinator, on any other rank.

    Raises:
        RankFailed: the coordinator did not come in time, or the session has failed already.
    """
    transport, rank = peers.transport, peers.rank
    token = token_hex(16)
    request, missed = transport.request_key(rank), transport.missed_key(rank)
    answer = transport.answer_key(token)
    report = peers.long_wait(lambda: ([0], "it has not answered the request to enter"))
    transport.set(request, f"{token} {peers.host}".encode())
    try:
        timeout = peers.timeouts.deadline_seconds + _EXTRA_SECONDS
        found = peers.wait_in_slices([missed, answer], timeout, report)
        if found is None:
            cause = _absence(peers, 0)
            raise RankFailed(peers.members[0], UNKNOWN_HOST, "enter", peers.path, cause)
        data = transport.get(found)
    finally:
        transport.delete([request, answer, missed])
    if found == missed:
        raise peers.failed(data)
    transport.session_id, host = json.loads(data)
    if peers.members[0] == 0:  # The process that hosts the store, where a rank does.
        peers.coordinator_host = host
    peers.start_heartbeats()
    peers.look_for_failure()


class _Answered(NamedTuple):
    """A request that the coordinator has answered."""

    request: bytes
    at: float

    @property
    def host(self) -> str:
        return self.request.decode().partition(" ")[2] or UNKNOWN_HOST


class Admission:
    """The coordinator's side: it lets the other ranks in.

    Attributes:
        failed_by_absence: whether the session failed because a rank never came.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers, self._transport = peers, peers.transport
        self._answered: dict[int, _Answered] = {}
        self.failed_by_absence = False

    @property
    def admitted(self) -> set[int]:
        """The ranks whose requests have been answered."""
        return set(self._answered)

    def admit_all(self) -> None:
        """Begin a session, and let all other ranks in.

        Raises:
            RankFailed: a rank did not come in time, or died while it entered.
        """
        transport, size = self._transport, self._peers.size
        transport.session_id = transport.new_session_id(token_hex(16))
        self._peers.start_heartbeats()
        end = monotonic() + self._peers.timeouts.deadline_seconds
        report = self._peers.long_wait(self._missing)
        # All are answered before any is waited for, or they would enter one after the other.
        for rank in range(1, size):
            seconds = min(_RECHECK_SECONDS, end - monotonic())
            if self._peers.wait([transport.request_key(rank)], rank, seconds, report) is None:
                break
            self._answer(rank)
        for rank in range(1, size):
            self._admit(rank, end, report)

    def ranks_per_host(self) -> dict[str, int]:
        """Return how many ranks each host has, by the last request of each rank."""
        others = (answered.host for answered in self._answered.values())
        return Counter([self._peers.host, *others])

    def _admit(self, rank: int, end: float, report: LongWait) -> None:
        """Answer a rank until it has entered; again, if it has given up and come again."""
        entered = self._transport.heartbeat_key(rank)
        request = self._transport.request_key(rank)
        while True:
            answered = self._answered.get(rank)
            keys, until = [entered, request], end
            if answered is not None:
                keys, until = [entered], answered.at + self._peers.timeouts.silence_seconds
            seconds = min(_RECHECK_SECONDS, until - monotonic())
            found = self._peers.wait(keys, rank, seconds, report)
            if found == entered:
                return
            # While this rank is waited for, the others enter, and watch each other.
            for other in [rank] if found else range(rank, self._peers.size):
                self._answer(other)
            if found is None and monotonic() >= until and self._answered.get(rank) is answered:
                self.failed_by_absence = answered is None
                cause = self._peers.silence if answered else _absence(self._peers, rank)
                raise self._peers.blame(rank, cause)

    def _answer(self, rank: int) -> None:
        """Answer the request of a rank, if it has posted one that is not answered yet."""
        request = self._transport.peek(self._transport.request_key(rank))
        answered = self._answered.get(rank)
        if request is None or (answered is not None and answered.request == request):
            return
        token = request.decode().partition(" ")[0]
        answer = json.dumps([self._transport.session_id, self._peers.host]).encode()
        self._transport.post(self._transport.answer_key(token), answer)
        self._answered[rank] = _Answered(request, monotonic())

    def _missing(self) -> tuple[list[int], str]:
        heartbeat, exists = self._transport.heartbeat_key, self._transport.exists
        ranks = [rank for rank in range(1, self._peers.size) if not exists(heartbeat(rank))]
        return ranks, f"{'it has' if len(ranks) == 1 else 'they have'} not entered"


def _absence(peers: Peers, rank: int) -> str:
    """The cause of a failure of a rank that never came."""
    seconds = peers.timeouts.deadline_seconds
    elsewhere = peers.entering_elsewhere(rank)
    return f"it did not enter this {peers.work} within {seconds:g} s{elsewhere}"
