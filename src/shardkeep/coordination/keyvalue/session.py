"""A session over the job's key-value store: how ranks enter, talk, fail together and leave.

**Entering.** See `entry`.

**Talking.** A message to one rank is removed by its receiver. Broadcasts are removed by the
coordinator when all ranks have left. See `transport` for the keys.

**Failing.** The first rank that fails publishes its failure, which every wait watches. Every other
rank that finds it raises `RankFailed`. See `peers`.

**Leaving.** A successful session ends with a gather and a broadcast, those of the work itself or an
empty pair, so that no rank leaves before all have come that far. Then each rank says that it
leaves. The coordinator leaves last, as its process may host the store.

Ranks find each other by work and path, so whatever can fail belongs inside the session: a rank that
fails before it enters, and then comes with the next state for the same path, meets the others in
the session that it missed.

Sessions may run at the same time, in different threads. A rank enters those of one work on one path
one after another, in the same order as all other ranks: a request to enter belongs to the session
that is being entered.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from types import TracebackType

from shardkeep.coordination.contract import Session
from shardkeep.coordination.events import EventSender
from shardkeep.coordination.keyvalue.contract import KeyValueStore
from shardkeep.coordination.keyvalue.entry import Admission, enter
from shardkeep.coordination.keyvalue.peers import UNKNOWN_HOST, Failure, Peers
from shardkeep.coordination.keyvalue.timeouts import Timeouts
from shardkeep.coordination.keyvalue.transport import SessionTransport

__all__ = ["KeyValueSession"]


class KeyValueSession(Session):
    """One rank's side of a session.

    Args:
        keys: the job's key-value store, through this rank's own client.
        rank: this rank, counted among the members.
        members: global ranks, for messages; the same on all ranks, in the same order.
        work, path: what is done, and on what; the same texts on all ranks.
        scope: sets jobs or restarts apart that share a store.
        by_path: False lets ranks meet that name the path differently. Then a process enters one
            session of one work at a time.
        timeouts: how long to wait; None takes it from the settings.
        events: logs and passes on what happens; None logs it.
    """

    def __init__(
        self,
        keys: KeyValueStore,
        rank: int,
        members: tuple[int, ...] | range,
        work: str,
        path: str,
        *,
        scope: str = "",
        by_path: bool = True,
        timeouts: Timeouts | None = None,
        events: EventSender | None = None,
    ) -> None:
        timeouts = timeouts or Timeouts.from_settings()
        events = events or EventSender(None, path=path, rank=members[rank])
        self._transport = SessionTransport(
            keys, scope, members, [work, path] if by_path else [work]
        )
        self._peers = Peers(self._transport, rank, members, work, path, timeouts, events)
        self._admission = Admission(self._peers)
        self._calls = 0
        self._concluded = False
        self._ranks_per_host: dict[str, int] | None = None

    @property
    def rank(self) -> int:
        return self._peers.rank

    @property
    def size(self) -> int:
        return self._peers.size

    def phase(self, name: str) -> None:
        self._peers.begin_phase(name)

    def set_path(self, path: str) -> None:
        self._peers.path = path

    def check(self) -> None:
        self._peers.check()

    def host(self, rank: int) -> str:
        with suppress(ConnectionError):
            if (heartbeat := self._peers.heartbeat_of(rank)) is not None:
                return heartbeat.host
        return UNKNOWN_HOST

    def ranks_on_this_host(self) -> int:
        self._require_entered()
        if self._ranks_per_host is None:
            key = self._transport.hosts_key
            with self._peers.explained_errors():
                self._peers.wait_for(key, 0, lambda: ([0], "it has not let all ranks enter"))
                self._ranks_per_host = json.loads(self._transport.get(key))
        return self._ranks_per_host[self._peers.host]

    # --- talking ---------------------------------------------------------------------------------

    def gather(self, message: bytes) -> list[bytes] | None:
        number = self._next_call()
        keys = [self._transport.message_key(number, "gather", rank) for rank in range(self.size)]
        with self._peers.explained_errors():
            self._peers.look_for_failure()
            if self.rank:
                self._transport.send(keys[self.rank], message)
                return None
            return [message, *(self._receive_from(rank, keys) for rank in range(1, self.size))]

    def scatter(self, messages: Sequence[bytes] | None) -> bytes:
        number = self._next_call()
        if self.rank:
            return self._receive(self._transport.message_key(number, "scatter", self.rank))
        if messages is None or len(messages) != self.size:
            raise ValueError(f"the coordinator scatters one message to each rank: {self.size}")
        with self._peers.explained_errors():
            self._peers.look_for_failure()
            for rank in range(1, self.size):
                key = self._transport.message_key(number, "scatter", rank)
                self._transport.send(key, messages[rank])
        return messages[0]

    def broadcast(self, message: bytes | None) -> bytes:
        key = self._transport.message_key(self._next_call(), "broadcast")
        if self.rank:
            return self._receive(key, keep=True)
        if message is None:
            raise ValueError("the coordinator has no message to broadcast")
        with self._peers.explained_errors():
            self._peers.look_for_failure()
            self._transport.send(key, message)
        return message

    def conclude(self) -> None:
        self._concluded = True

    def _next_call(self) -> int:
        self._require_entered()
        self._calls += 1
        return self._calls

    def _require_entered(self) -> None:
        if not self._transport.session_id:
            raise RuntimeError("a session can only be used in a with block")

    def _receive(self, key: str, *, keep: bool = False) -> bytes:
        """Receive a message of the coordinator."""
        with self._peers.explained_errors():
            arrival = self._transport.arrival_key(key)
            self._peers.wait_for(arrival, 0, lambda: ([0], "its message has not come"))
            return self._transport.receive(key, keep=keep)

    def _receive_from(self, rank: int, keys: Sequence[str]) -> bytes:
        """Receive the message of one rank. `keys` are those of all ranks' messages."""
        arrivals = list(map(self._transport.arrival_key, keys))

        def missing() -> tuple[list[int], str]:
            ranks = [r for r in range(rank, self.size) if not self._transport.exists(arrivals[r])]
            return ranks, "the message has not come" if len(ranks) == 1 else "no message has come"

        self._peers.wait_for(arrivals[rank], rank, missing)
        return self._transport.receive(keys[rank])

    # --- entering and leaving --------------------------------------------------------------------

    def __enter__(self) -> KeyValueSession:
        entering = self._transport.entering_key(self.rank)
        try:
            with self._peers.explained_errors():
                description = f"{self._peers.work} of {self._peers.path}"
                self._transport.set(entering, description.encode())
                try:
                    self._enter()
                finally:
                    self._transport.delete([entering])
        except BaseException as error:
            self._fail(error)
            raise
        return self

    def _enter(self) -> None:
        if self.rank:
            enter(self._peers)
            return
        self._admission.admit_all()
        self._ranks_per_host = self._admission.ranks_per_host()
        hosts = json.dumps(self._ranks_per_host).encode()
        self._transport.post(self._transport.hosts_key, hosts)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._concluded:
            self._leave()
            return
        if error is not None:
            self._fail(error)
            return
        try:
            self.gather(b"")
            self.broadcast(b"")
        except BaseException as late:
            self._fail(late)
            raise
        self._leave()

    def _fail(self, error: BaseException) -> None:
        """Publish an error of this rank, and leave."""
        if not self._transport.session_id:
            return  # No other rank knows of this session.
        with suppress(ConnectionError):
            cause = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            peers = self._peers
            failure = peers.publish(Failure(self.rank, peers.host, peers.phase, cause))
            if self.rank:
                self._transport.delete_posted()
            elif not self._admission.failed_by_absence:
                # The ranks that have not entered yet find the failure when they come. Not if a rank
                # never came: it may never come to this session at all, and would then take the
                # next one for it.
                for rank in set(range(1, self.size)) - self._admission.admitted:
                    self._transport.set(self._transport.missed_key(rank), failure)
        self._leave()

    def _leave(self) -> None:
        """Say that this rank leaves. Raises nothing: what has been decided stays."""
        self._peers.stop_heartbeats()
        with suppress(ConnectionError):
            if self.rank:
                self._transport.set(self._transport.left_key(self.rank), b"")
            elif self._all_have_left():
                self._transport.delete_session(self.size)

    def _all_have_left(self) -> bool:
        """Wait for all ranks that entered, but not long: a rank may be dead, or slow to notice.

        If the coordinator's process, which may host the store, ended at once, the others would see
        a broken connection in place of the failure.
        """
        end = monotonic() + self._peers.timeouts.silence_seconds
        blamed, all_left = self._peers.blamed, True
        # The rank that failed is not waited for. It comes last, so that it has time to leave, too.
        for rank in sorted(self._admission.admitted, key=lambda rank: rank == blamed):
            seconds = 0.0 if rank == blamed else end - monotonic()
            left = self._transport.wait([self._transport.left_key(rank)], seconds)
            all_left = all_left and left is not None
        return all_left
