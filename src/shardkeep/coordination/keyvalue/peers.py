"""The other ranks of a session: waiting for them, watching them, passing failures on.

Every wait watches one key, under which the first failure of the session is published. A rank that
finds it raises `RankFailed`. Ranks that die publish nothing: their heartbeats stop, and the rank
that watches them publishes the failure in their place.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from time import monotonic
from typing import NamedTuple

from shardkeep.coordination.events import EventSender, WaitingForRanks
from shardkeep.coordination.keyvalue.heartbeat import Heartbeat, HeartbeatMonitor
from shardkeep.coordination.keyvalue.timeouts import Timeouts
from shardkeep.coordination.keyvalue.transport import SessionTransport
from shardkeep.coordination.waiting import LongWait
from shardkeep.errors import RankFailed

__all__ = ["UNKNOWN_HOST", "Failure", "Missing", "Peers"]

UNKNOWN_HOST = "an unknown host"
_EXTRA_SECONDS = 0.5
"""By how much other ranks wait longer than the coordinator, which knows better who is late."""
_CHECK_INTERVAL_SECONDS = 0.5
"""Interval of looks for failures where no heartbeat thread looks for them."""

Missing = Callable[[], tuple[Sequence[int], str]]
"""Returns the ranks that have not come, and what they have not done."""


class Failure(NamedTuple):
    """The first failure of a session, as it is published to all ranks."""

    rank: int
    host: str
    phase: str
    cause: str


class Peers:
    """The other ranks of a session, as this rank sees them.

    Args:
        transport: the keys of the session.
        rank: this rank, counted among the members.
        members: their global ranks, for messages.
        work, path: what the session does, for messages.
        events: logs and passes on the events of this session.

    Attributes:
        phase: the phase that this rank is in.
        host: the name of this rank's host.
        coordinator_host: the host of the rank that hosts the store, where a rank does.
        blamed: the rank whose failure ended the session; None so far.
    """

    def __init__(
        self,
        transport: SessionTransport,
        rank: int,
        members: tuple[int, ...] | range,
        work: str,
        path: str,
        timeouts: Timeouts,
        events: EventSender,
    ) -> None:
        self.transport, self.rank, self.members = transport, rank, members
        self.work, self.path = work, path
        self.timeouts = timeouts
        self.phase = "enter"
        self.host = socket.gethostname()
        self.coordinator_host = UNKNOWN_HOST
        self.blamed: int | None = None
        self._events = events
        self._monitor: HeartbeatMonitor | None = None
        self._heartbeats = 0
        self._waiting_for: int | None = None
        self._next_check = 0.0

    @property
    def size(self) -> int:
        return len(self.members)

    # --- this rank, for the others ---------------------------------------------------------------

    def start_heartbeats(self) -> None:
        """Enter the session: the first heartbeat says so to the others."""
        watched = (self.rank + 1) % self.size

        def next_heartbeat() -> Heartbeat:
            self._heartbeats += 1
            return Heartbeat(self._heartbeats, self.host, self.phase, self._waiting_for)

        def on_silence(last: Heartbeat) -> None:
            self.publish(Failure(watched, last.host, last.phase, self.silence))

        self._monitor = HeartbeatMonitor(
            self.transport.keys,
            self.transport.heartbeat_key(self.rank),
            self.transport.heartbeat_key(watched),
            self.transport.failure_key,
            next_heartbeat,
            on_silence,
            self.timeouts,
        )
        self._monitor.start()

    def stop_heartbeats(self) -> None:
        if self._monitor is not None:
            self._monitor.stop()

    def begin_phase(self, name: str) -> None:
        """Name the phase that this rank is in from now on."""
        self.phase = name
        # Published at once. Otherwise, a rank that is killed soon after would be reported to have
        # been in an earlier phase.
        if self._monitor is not None and self.timeouts.heartbeat_seconds:
            with suppress(ConnectionError):  # The next call finds it, too.
                self._monitor.send()

    # --- failures --------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `RankFailed` if the heartbeat thread has found a failure. Nearly free."""
        monitor = self._monitor
        if monitor is None:
            return
        with self.explained_errors():
            if monitor.unreachable is not None:
                raise monitor.unreachable
            if monitor.failure is not None:
                raise self.failed(monitor.failure)
            if not self.timeouts.heartbeat_seconds and monotonic() >= self._next_check:
                self._next_check = monotonic() + _CHECK_INTERVAL_SECONDS
                self.look_for_failure()

    def look_for_failure(self) -> None:
        """Raise `RankFailed` if a failure has been published."""
        if (failure := self.transport.peek(self.transport.failure_key)) is not None:
            raise self.failed(failure)

    def publish(self, failure: Failure) -> bytes:
        """Publish a failure, unless there is one, and return the one that is published.

        The first failure stays, as most later ones are consequences of it.
        """
        published = self.transport.peek(self.transport.failure_key)
        if published is None:
            published = json.dumps(failure).encode()
            self.transport.set(self.transport.failure_key, published)
        return published

    def failed(self, data: bytes) -> RankFailed:
        """Return the error to raise for a published failure."""
        failure = Failure(*json.loads(data))
        self.blamed = failure.rank
        global_rank = self.members[failure.rank]
        return RankFailed(global_rank, failure.host, failure.phase, self.path, failure.cause)

    def blame(self, rank: int, cause: str) -> RankFailed:
        """Publish that a rank has not done its part: if it waits for another one, that one."""
        heartbeat = self.heartbeat_of(rank)
        culprit = None if heartbeat is None else heartbeat.waiting_for
        if culprit is not None and culprit != self.rank:
            rank, heartbeat = culprit, self.heartbeat_of(culprit)
        host, phase = UNKNOWN_HOST, self.phase
        if heartbeat is not None:
            host, phase = heartbeat.host, heartbeat.phase
        return self.failed(self.publish(Failure(rank, host, phase, cause)))

    @property
    def silence(self) -> str:
        """The cause of a failure of a rank whose heartbeats stopped."""
        return f"it stopped answering: no heartbeat for {self.timeouts.silence_seconds:g} s"

    @contextmanager
    def explained_errors(self) -> Iterator[None]:
        """Turn errors of the store into what they mean for the session."""
        try:
            yield
        except KeyError:
            self.look_for_failure()  # A rank that fails takes its messages back.
            raise
        except ConnectionError as error:
            cause = f"the job's store, which runs beside rank 0, is out of reach: {error}"
            host = self.coordinator_host
            raise RankFailed(0, host, self.phase, self.path, cause) from error

    # --- waiting ---------------------------------------------------------------------------------

    def wait_for(self, key: str, rank: int, missing: Missing) -> None:
        """Wait until a key exists that `rank` should set.

        Raises:
            RankFailed: a failure was published, or the deadline has passed.
        """
        deadline = self.timeouts.deadline_seconds
        # The coordinator gives up before those who wait for it: it knows which rank is late.
        timeout = deadline + (_EXTRA_SECONDS if self.rank else 0.0)
        if self.wait([key], rank, timeout, self.long_wait(missing)) is None:
            raise self.blame(rank, f"it did not answer within {deadline:g} s")

    def wait(self, keys: Sequence[str], rank: int, timeout: float, report: LongWait) -> str | None:
        """Return the first of the keys that exists, None after the timeout.

        Args:
            rank: the rank that should set the keys, for its heartbeat's readers.
            report: tells the user when the wait is long.

        Raises:
            RankFailed: a failure was published.
        """
        failure = self.transport.failure_key
        self._waiting_for = rank
        found = self.wait_in_slices([*keys, failure], timeout, report)
        self._waiting_for = None
        if found == failure:
            raise self.failed(self.transport.get(failure))
        return found

    def wait_in_slices(self, keys: Sequence[str], timeout: float, report: LongWait) -> str | None:
        """Wait for the first of the keys, with reports in between; None after the timeout."""
        end = monotonic() + timeout
        while True:
            found = self.transport.wait(keys, report.slice(end - monotonic()))
            if found is not None or monotonic() >= end:
                return found
            report.report_if_due()

    def long_wait(self, missing: Missing) -> LongWait:
        """Return what reports a wait that begins now."""

        def report(seconds: float) -> None:
            ranks, reason = missing()
            if ranks:
                event = WaitingForRanks(
                    path=self.path,
                    work=self.work,
                    waiting_for=tuple(self.members[rank] for rank in ranks),
                    phase=self.phase,
                    reason=f"{reason}{self._whereabouts(ranks[0])}",
                    seconds=seconds,
                )
                self._events(event)

        return LongWait(report)

    # --- what is known of the others -------------------------------------------------------------

    def heartbeat_of(self, rank: int) -> Heartbeat | None:
        """Return the last heartbeat of a rank; None if it has not entered the session."""
        data = self.transport.peek(self.transport.heartbeat_key(rank))
        return None if data is None else Heartbeat.decode(data)

    def entering_elsewhere(self, rank: int) -> str:
        """Describe the other session that a rank waits to enter; an empty text if there is none."""
        entering = self.transport.peek(self.transport.entering_key(rank))
        if entering is None or entering.decode() == f"{self.work} of {self.path}":
            return ""
        return f"; it waits to enter the {entering.decode()}"

    def _whereabouts(self, rank: int) -> str:
        """Describe what a rank does in place of what this one waits for."""
        if not self.transport.session_id or (heartbeat := self.heartbeat_of(rank)) is None:
            return self.entering_elsewhere(rank)
        text = f"; rank {self.members[rank]} on {heartbeat.host} is in phase {heartbeat.phase!r}"
        if heartbeat.waiting_for is not None:
            text += f" and waits for rank {self.members[heartbeat.waiting_for]}"
        return text
