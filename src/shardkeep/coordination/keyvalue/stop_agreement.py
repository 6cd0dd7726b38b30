"""A step at which all ranks stop: agreed while they train, with no rank waiting for training.

A signal reaches ranks at different steps, or only one of them. Ranks that each stopped at their
next step would wait for one another for ever: one at step 7, another inside step 8, in a collective
that needs the first. So they have to agree on a step that none of them has passed yet.

Each rank has a thread that looks every now and then whether any rank has *asked*. Once one has,

1. each thread says how far its rank may have come: `hold`, the first boundary between steps that it
   has not passed. Its training goes on up to there, and stands still if it arrives before 3.
2. The coordinator's thread takes the greatest of them, which is the *target*, and says so.
3. Everyone goes on to the target. No rank has passed it, and no rank waits before it any more.

What a rank stands still for are answers of threads, never of training. So no collective of the job
can be what keeps an answer back, and there is no deadlock. Boundaries are counted rather than
numbered by their steps: a job may go back to an earlier step.

A rank that leaves says "never" in advance: whoever asks then finds a target that nobody reaches.
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
from shardkeep.coordination.keyvalue.timeouts import Timeouts
from shardkeep.errors import RankFailed

__all__ = ["Alone", "End", "KeyValueStopAgreement"]

_PHASE = "agree on a step"
_NOWHERE = "an unknown host"
_NEVER = 2**63 - 1
_LOOK = 0.2
"""Seconds after which a thread that waits looks whether its rank leaves."""
_CROWD = 1024
"""Ranks beyond which each one looks less often, so that the store's host is not kept busy."""


class Alone(StopAgreement):
    """Nobody else to ask."""

    def __init__(self) -> None:
        self._asked = False
        self._step: int | None = None
        self._met = False

    def request(self) -> None:
        self._asked = True

    def at(self, step: int) -> bool:
        if step != self._step:
            self._step, self._met, self._asked = step, self._asked, False
        return self._met

    def close(self) -> None:
        """Nobody to tell."""


class KeyValueStopAgreement(StopAgreement):
    """Ranks that share a key-value store; see the module.

    Who drops it without closing it leaves, too: the thread knows the end only.
    """

    def __init__(self, end: End) -> None:
        self._end = end
        finalize(self, end.leave).atexit = False  # The thread ends with the program anyway.

    def request(self) -> None:
        self._end.request()

    def at(self, step: int) -> bool:
        return self._end.at(step)

    def close(self) -> None:
        self._end.close()


class End:
    """One rank's end of a meeting, which its thread has, too.

    Args:
        keys: this rank's client of it.
        rank: counted among the members.
        members: their global ranks, for messages.
        session: begins a session of all ranks, in which the first call of `at` agrees on a name.
        path: what errors say that it was about.
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
        self._keys, self._rank, self._members = keys, rank, members
        self._session, self._path = session, path
        self._timeouts = timeouts or Timeouts.from_settings()
        self._pause = settings.stop_poll_seconds() * max(1.0, len(members) / _CROWD)
        self._base = self._round = self._before = ""
        self._thread: Thread | None = None
        self._stop = Event()
        self._asked = False
        self._step: int | None = None
        self._met = False
        self._lock = Lock()
        """Of the following two: a hold is said for what has been passed just then."""
        self._passed = 0
        self._holds = False
        self._target = _NEVER
        self._known, self._over = Event(), Event()
        self._lost: Exception | None = None

    def request(self) -> None:
        self._asked = True  # No lock, no event: a handler may have interrupted whoever has it.

    def at(self, step: int) -> bool:
        if self._thread is None:
            self._begin()
        if step != self._step:
            self._met = self._arrive()
            self._step = step
        return self._met

    def close(self) -> None:
        if self._thread is None:
            return
        self.leave()
        self._thread.join(self._timeouts.silence_seconds)

    def leave(self) -> None:
        self._stop.set()
        self._over.set()

    def _begin(self) -> None:
        with self._session() as session:
            name = session.broadcast(None if self._rank else token_hex(16).encode())
        self._base = f"shardkeep/meeting/{name.decode()}"
        self._thread = Thread(target=self._watch, name="shardkeep-meeting", daemon=True)
        self._thread.start()

    # --- training --------------------------------------------------------------------------------

    def _arrive(self) -> bool:
        """At the next boundary: whether it is the target."""
        with self._lock:
            if not self._holds:
                self._passed += 1
                return False
        if not self._known.wait(self._timeouts.silence_seconds):
            raise self._missing()
        if self._lost is not None:
            cause = f"the job's store is out of reach: {self._lost}"
            raise RankFailed(self._members[0], _NOWHERE, _PHASE, self._path, cause) from self._lost
        with self._lock:
            self._passed += 1
            if self._passed < self._target:
                return False
            self._holds, self._asked = False, False
        self._known.clear()
        self._over.set()
        return True

    def _missing(self) -> RankFailed:
        """Who has not answered; the coordinator, if all others have."""
        late = 0
        for rank in range(len(self._members)):
            if self._keys.wait([self._hold(rank)], 0) is None:
                late = rank
                break
        cause = f"its thread did not answer within {self._timeouts.silence_seconds:g} s"
        return RankFailed(self._members[late], _NOWHERE, _PHASE, self._path, cause)

    # --- the thread ------------------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            for number in count():
                self._before, self._round = self._round, f"{self._base}/{number}"
                if not self._one_round():
                    return
        except (ConnectionError, KeyError) as error:
            # Training is told only if it waits: a job whose store ends with it needs no agreement.
            self._lost = error
            self._known.set()

    def _one_round(self) -> bool:
        """From one target to the next; False if this rank leaves."""
        if not self._await_asking():
            self._keys.set(self._hold(self._rank), b"%d" % _NEVER)
            return self._leave()
        with self._lock:
            self._holds = True
            hold = _NEVER if self._stop.is_set() else self._passed + 1
        self._keys.set(self._hold(self._rank), b"%d" % hold)
        target = f"{self._round}/target"
        if not self._rank and not self._settle(target):
            return self._leave()
        if not self._until(target):
            return False
        self._target = int(self._keys.get(target))
        self._known.set()
        self._over.wait()
        self._over.clear()
        return True

    def _await_asking(self) -> bool:
        asked = f"{self._round}/asked"
        while self._keys.wait([asked], 0) is None:
            if self._stop.is_set():
                return False
            if self._asked:
                self._keys.set(asked, b"1")
            else:
                self._stop.wait(self._pause)
        return True

    def _settle(self, target: str) -> bool:
        """Take the greatest of what all ranks hold at; False if this one leaves before."""
        holds = []
        for rank in range(len(self._members)):
            if not self._until(self._hold(rank)):
                return False
            holds.append(int(self._keys.get(self._hold(rank))))
        self._keys.set(target, b"%d" % max(holds))
        self._keys.delete(map(self._hold, range(len(self._members))))
        if self._before:  # All have answered in this round, so they have done with that one.
            self._keys.delete([f"{self._before}/asked", f"{self._before}/target"])
        return True

    def _leave(self) -> bool:
        if not self._rank:
            self._keys.set(f"{self._round}/target", b"%d" % _NEVER)
        return False

    def _until(self, key: str) -> bool:
        """Wait for a key; False if this rank leaves before it is there."""
        while self._keys.wait([key], _LOOK) is None:
            if self._stop.is_set():
                return False
        return True

    def _hold(self, rank: int) -> str:
        return f"{self._round}/hold/{rank}"
