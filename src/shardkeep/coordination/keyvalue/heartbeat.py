"""Signs of life: a store of keys tells nothing about a peer that was killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Lock, Thread

from shardkeep.coordination.keyvalue.contract import KeyValueStore
from shardkeep.coordination.keyvalue.timeouts import Timeouts

__all__ = ["Heartbeat", "Sign"]


@dataclass(frozen=True, slots=True)
class Sign:
    """What a rank says of itself with each heartbeat; `waits` is the rank it waits for, if any."""

    beat: int
    host: str
    phase: str
    waits: int | None

    def encode(self) -> bytes:
        return json.dumps([self.beat, self.host, self.phase, self.waits]).encode()

    @staticmethod
    def decode(data: bytes) -> Sign:
        return Sign(*json.loads(data))


class Heartbeat:
    """Sends this rank's signs of life, watches those of one other rank, and hears of failures.

    All that in a thread of its own, so that long work between two messages can ask what is known.

    Rank r watches rank r + 1, the last one watches rank 0: whoever dies has someone alive before
    him in the ring, and no rank has more than one other to look at.

    Args:
        keys: where the signs are.
        own, watched: their keys.
        failed: the key of what all ranks are told of a failure.
        sign: makes the next sign of this rank.
        lost: called once with the last sign of the watched rank, when it has stopped; posts it
            under `failed`.

    Attributes:
        failure: what was found under `failed`; None so far.
        unreachable: why the store can't be reached; None if it can.
    """

    def __init__(
        self,
        keys: KeyValueStore,
        own: str,
        watched: str,
        failed: str,
        sign: Callable[[], Sign],
        lost: Callable[[Sign], None],
        timeouts: Timeouts,
    ) -> None:
        self._keys, self._own, self._watched, self._failed = keys, own, watched, failed
        self._sign, self._lost, self._timeouts = sign, lost, timeouts
        self._last = b""
        self._missed = 0
        self.failure: bytes | None = None
        self.unreachable: ConnectionError | None = None
        self._telling = Lock()
        self._stop = Event()
        self._thread = Thread(target=self._run, name="shardkeep-heart", daemon=True)

    def start(self) -> None:
        """The first sign is there on return: it says that this rank has entered."""
        self.tell()
        if self._timeouts.heartbeat_seconds:
            self._thread.start()

    def tell(self) -> None:
        """Send a sign of life now: nobody's thread comes between its making and its sending."""
        with self._telling:
            self._keys.set(self._own, self._sign().encode())

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            # Not for ever: a call to a store whose host is frozen does not return.
            self._thread.join(self._timeouts.silence_seconds)

    def _run(self) -> None:
        while not self._stop.wait(self._timeouts.heartbeat_seconds):
            try:
                self.tell()
                self._look()
            except ConnectionError as error:
                self.unreachable = error
                return
            except KeyError:
                continue  # the watched rank left in between

    def _look(self) -> None:
        found = self._keys.wait([self._failed, self._watched], 0)
        if found == self._failed:
            self.failure = self._keys.get(found)
        elif found is not None and self._stopped():  # else not entered yet, or all are leaving
            self._lost(Sign.decode(self._last))

    def _stopped(self) -> bool:
        """Counted in looks, not in seconds: while this process is suspended, nobody misses any."""
        sign = self._keys.get(self._watched)
        self._missed = self._missed + 1 if sign == self._last else 0
        self._last = sign
        return self._missed >= self._timeouts.max_missed_heartbeats
