"""A step at which all ranks stop, agreed on while they train, without waiting for training.

A signal reaches ranks at different steps, or only one of them. If each rank stopped at its next
step, they would wait for one another for ever: one at step 7, another inside step 8, in a
collective that needs the first. So they agree on a step that none of them has passed yet.

Each rank has a thread that looks at intervals whether any rank has *requested* a stop. Then

1. each thread publishes the boundary between two steps at which its rank *holds*: the first one
   that it has not passed. Training continues up to there, and waits there if it arrives before 3.
2. The coordinator's thread publishes the greatest of them, which is the *target*.
3. All ranks continue to the target. No rank has passed it, and no rank waits before it any more.

What a rank waits for are answers of threads, never of training. So no collective of the job can
delay an answer, and there is no deadlock. Boundaries are counted, rather than identified by their
steps, because a job may go back to an earlier step.

If a rank has left, the target is one that no rank reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from secrets import token_hex
from threading import Event, Lock, Thread
from weakref import finalize

from shardkeep import settings
from shardkeep.coordination.contract import Session, StopAgreement
from shardkeep.coordination.keyvalue.contract import KeyValueStore
from shardkeep.coordination.keyvalue.peers import UNKNOWN_HOST
from shardkeep.coordination.keyvalue.stop_transport import NEVER, StopTransport
from shardkeep.coordination.keyvalue.timeouts import Timeouts
from shardkeep.errors import RankFailed

__all__ = ["KeyValueStopAgreement"]

_PHASE = "agree on a step"
_MAX_RANKS_AT_FULL_RATE = 1024
"""With more ranks, each one looks less often, so that the store's host is not kept busy."""


class KeyValueStopAgreement(StopAgreement):
    """A stop agreement of ranks that share a key-value store.

    If it is dropped without being closed, the rank leaves, too: the thread has no reference to it.

    Args:
        keys: the job's key-value store, through this rank's own client.
        rank: this rank, counted among the members.
        members: their global ranks, for messages.
        session: begins a session of all ranks, in which they agree on a name for their keys.
        path: what the agreement is about, for messages.
    """

    def __init__(
        self,
        keys: KeyValueStore,
        rank: int,
        members: tuple[int, ...] | range,
        session: Callable[[], Session],
        path: str,
        *,
        timeouts: Timeouts | None = None,
    ) -> None:
        timeouts = timeouts or Timeouts.from_settings()
        self._participant = _Participant(keys, rank, members, session, path, timeouts)
        # Not at exit: the thread ends with the program anyway.
        finalize(self, self._participant.leave).atexit = False

    def request(self) -> None:
        self._participant.request()

    def stops_at(self, step: int) -> bool:
        return self._participant.stops_at(step)

    def close(self) -> None:
        self._participant.close()


class _Participant:
    """One rank of a stop agreement: its training thread, and the thread that answers for it."""

    def __init__(
        self,
        keys: KeyValueStore,
        rank: int,
        members: tuple[int, ...] | range,
        session: Callable[[], Session],
        path: str,
        timeouts: Timeouts,
    ) -> None:
        self._keys, self._rank, self._members = keys, rank, members
        self._session, self._path, self._timeouts = session, path, timeouts
        crowding = max(1.0, len(members) / _MAX_RANKS_AT_FULL_RATE)
        self._poll_seconds = settings.stop_poll_seconds() * crowding
        self._transport: StopTransport | None = None
        self._thread: Thread | None = None
        self._leaving = Event()
        self._requested = False
        self._step: int | None = None
        self._stops = False
        self._lock = Lock()
        """Guards the next two: a hold must be the first boundary that is not passed when it is
        published."""
        self._passed = 0
        self._holding = False
        self._round = 0
        self._target = NEVER
        self._target_known, self._target_reached = Event(), Event()
        self._lost_store: Exception | None = None

    # --- the training thread ---------------------------------------------------------------------

    def request(self) -> None:
        # No lock and no event: a signal handler may have interrupted the thread that has the lock.
        self._requested = True

    def stops_at(self, step: int) -> bool:
        if self._thread is None:
            self._start()
        if step != self._step:
            self._stops = self._pass_boundary()
            self._step = step
        return self._stops

    def close(self) -> None:
        if self._thread is not None:
            self.leave()
            self._thread.join(self._timeouts.silence_seconds)

    def leave(self) -> None:
        self._leaving.set()
        self._target_reached.set()

    def _start(self) -> None:
        with self._session() as session:
            name = session.broadcast(None if self._rank else token_hex(16).encode()).decode()
        self._transport = StopTransport(
            self._keys, self._rank, len(self._members), name, self._leaving.is_set
        )
        self._thread = Thread(
            target=self._run, args=[self._transport], name="shardkeep-stop-agreement", daemon=True
        )
        self._thread.start()

    def _pass_boundary(self) -> bool:
        """Pass the next boundary; wait before it if this rank holds. Whether it is the target."""
        with self._lock:
            if not self._holding:
                self._passed += 1
                return False
        if not self._target_known.wait(self._timeouts.silence_seconds):
            raise self._no_answer()
        if self._lost_store is not None:
            cause = f"the job's store is out of reach: {self._lost_store}"
            raise self._failed(0, cause) from self._lost_store
        with self._lock:
            self._passed += 1
            if self._passed < self._target:
                return False
            self._holding, self._requested = False, False
        self._target_known.clear()
        self._target_reached.set()
        return True

    def _no_answer(self) -> RankFailed:
        assert self._transport is not None
        seconds = self._timeouts.silence_seconds
        late = self._transport.first_without_hold(self._round)
        return self._failed(late, f"its thread did not answer within {seconds:g} s")

    def _failed(self, rank: int, cause: str) -> RankFailed:
        return RankFailed(self._members[rank], UNKNOWN_HOST, _PHASE, self._path, cause)

    # --- the answering thread --------------------------------------------------------------------

    def _run(self, transport: StopTransport) -> None:
        try:
            for self._round in count():
                if not self._agree_once(transport, self._round):
                    break
            transport.leave(self._round)
        except (ConnectionError, KeyError) as error:
            # Raised only if training waits: a job whose store ends with it needs no agreement.
            self._lost_store = error
            self._target_known.set()

    def _agree_once(self, transport: StopTransport, round_number: int) -> bool:
        """Go through one round, up to its target; False if this rank leaves."""
        if not self._await_request(transport, round_number):
            return False
        with self._lock:
            self._holding = True
            boundary = NEVER if self._leaving.is_set() else self._passed + 1
        transport.hold(round_number, boundary)
        if not self._rank:
            holds = transport.holds(round_number)
            if holds is None:
                return False
            transport.set_target(round_number, max(holds))
        target = transport.target(round_number)
        if target is None:
            return False
        self._target = target
        self._target_known.set()
        self._target_reached.wait()
        self._target_reached.clear()
        return True

    def _await_request(self, transport: StopTransport, round_number: int) -> bool:
        """Wait until any rank requests a stop; False if this rank leaves before."""
        while not self._leaving.is_set():
            if transport.is_requested(round_number):
                return True
            if self._requested:
                transport.request(round_number)
            else:
                self._leaving.wait(self._poll_seconds)
        return False
