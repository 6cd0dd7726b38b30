"""Heartbeats: the job's key-value store does not report that a rank was killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Lock, Thread

from shardkeep.coordination.keyvalue.contract import KeyValueStore
from shardkeep.coordination.keyvalue.timeouts import Timeouts

__all__ = ["Heartbeat", "HeartbeatMonitor"]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a rank publishes about itself at regular intervals.

    Attributes:
        number: counts the heartbeats of the rank, so that each one differs from the last.
        host: the name of the rank's host.
        phase: the phase that the rank is in.
        waiting_for: the rank that it waits for; None if it does not wait.
    """

    number: int
    host: str
    phase: str
    waiting_for: int | None

    def encode(self) -> bytes:
        return json.dumps([self.number, self.host, self.phase, self.waiting_for]).encode()

    @staticmethod
    def decode(data: bytes) -> Heartbeat:
        return Heartbeat(*json.loads(data))


class HeartbeatMonitor:
    """Sends this rank's heartbeats, watches those of one other rank, and looks for failures.

    It does so in a thread of its own, so that long work between two messages can cheaply ask what
    is known.

    Rank r watches rank r + 1, and the last rank watches rank 0. So each rank that dies is noticed
    by one that is alive, and no rank has more than one other to watch.

    Args:
        keys: the store that the heartbeats are in.
        own_key, watched_key: the keys of this rank's heartbeat and of the watched one.
        failure_key: the key of the failure that all ranks are to raise.
        next_heartbeat: returns the next heartbeat of this rank.
        on_silence: called once with the last heartbeat of the watched rank after it stopped sending
            them. Has to publish a failure under `failure_key`.

    Attributes:
        failure: the value found under `failure_key`; None so far.
        unreachable: why the store is out of reach; None if it is not.
    """

    def __init__(
        self,
        keys: KeyValueStore,
        own_key: str,
        watched_key: str,
        failure_key: str,
        next_heartbeat: Callable[[], Heartbeat],
        on_silence: Callable[[Heartbeat], None],
        timeouts: Timeouts,
    ) -> None:
        self._keys = keys
        self._own_key, self._watched_key, self._failure_key = own_key, watched_key, failure_key
        self._next_heartbeat, self._on_silence = next_heartbeat, on_silence
        self._timeouts = timeouts
        self._last_watched = b""
        self._missed = 0
        self.failure: bytes | None = None
        self.unreachable: ConnectionError | None = None
        self._sending = Lock()
        self._stop = Event()
        self._thread = Thread(target=self._run, name="shardkeep-heartbeat", daemon=True)

    def start(self) -> None:
        """Send the first heartbeat, which says that this rank has entered; start the thread."""
        self.send()
        if self._timeouts.heartbeat_seconds:
            self._thread.start()

    def send(self) -> None:
        """Send a heartbeat now.

        The lock keeps an older heartbeat of one thread from replacing a newer one of another.
        """
        with self._sending:
            self._keys.set(self._own_key, self._next_heartbeat().encode())

    def stop(self) -> None:
        """Stop the thread. Waits for it, but not for ever: the store's host may be frozen."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(self._timeouts.silence_seconds)

    def _run(self) -> None:
        while not self._stop.wait(self._timeouts.heartbeat_seconds):
            try:
                self.send()
                self._watch()
            except ConnectionError as error:
                self.unreachable = error
                return
            except KeyError:
                continue  # The watched rank left between the look and the read.

    def _watch(self) -> None:
        found = self._keys.wait([self._failure_key, self._watched_key], 0)
        if found == self._failure_key:
            self.failure = self._keys.get(found)
        elif found is not None and self._is_silent():
            self._on_silence(Heartbeat.decode(self._last_watched))
        # Otherwise the watched rank has not entered yet, or all ranks are leaving.

    def _is_silent(self) -> bool:
        """Whether the watched rank missed too many heartbeats.

        Counted in looks, not in seconds: if this process was suspended, time has passed, but the
        other rank has missed nothing.
        """
        heartbeat = self._keys.get(self._watched_key)
        self._missed = self._missed + 1 if heartbeat == self._last_watched else 0
        self._last_watched = heartbeat
        return self._missed >= self._timeouts.max_missed_heartbeats
