"""A session over a key-value store: how ranks meet, talk, fail together and part.

**Meeting.** Each rank announces a random word of its own under a key of (scope, members, work,
path). The coordinator makes a random id for the session and answers each word with it; everything
else happens under that id. So nothing is counted: a session that some ranks never entered, or that
failed half-way on some of them, leaves nothing that a later one could mistake for its own. A word is
written and removed only by its rank, and answered under a key of its own, so an answer to an earlier
try of a rank is never read by a later one. The answered rank's first sign of life tells that it
came in.

**Talking.** Messages are pieces under `id/step/...`. The receiver of a message for one rank removes
it; broadcasts are removed by the coordinator when all have left.

**Failing.** Whoever fails sets `id/failed`, which every wait watches. Whoever sees it raises.

**Parting.** Leaving in peace is a gather and a broadcast, then a farewell: the coordinator, whose
process may host the store, leaves last.

Sessions on different paths (or of different work) may run at the same time, in different threads.
For one work on one path, a process has one session at a time.
"""

from __future__ import annotations

import hashlib
import json
import socket
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from secrets import token_hex
from time import monotonic
from types import TracebackType

from shardkeep.contracts import Session
from shardkeep.errors import RankFailed
from shardkeep.ranks.heart import Heart, Sign, Timing
from shardkeep.ranks.keys import KeyValue
from shardkeep.ranks.messages import count, join, split

__all__ = ["KeySession"]

_NOWHERE = "an unknown host"
_AGAIN = 1.0
"""Seconds after which the coordinator looks whether a rank that it answered has come anew."""


class KeySession(Session):
    """One rank's end of a session.

    Args:
        keys: the job's key-value store, through this rank's own client.
        rank: this rank, counted among the members.
        members: global ranks, for messages; the same on all, in the same order.
        work, path: what is done on what; the same text on all members.
        scope: sets jobs or restarts apart that share a store.
        timing: None takes it from the knobs.
    """

    def __init__(
        self,
        keys: KeyValue,
        rank: int,
        members: Sequence[int],
        work: str,
        path: str,
        *,
        scope: str = "",
        timing: Timing | None = None,
    ) -> None:
        self._keys, self._rank, self._members = keys, rank, tuple(members)
        self._work, self._path = work, path
        self._timing = timing or Timing.from_knobs()
        self._group = f"shardkeep/{_digest(scope, *map(str, members))}"
        self._base = f"{self._group}/{_digest(work, path)}"
        self._id = ""
        self._heart: Heart | None = None
        self._phase = "enter"
        self._waits: int | None = None
        self._beat = 0
        self._step = 0
        self._posted: list[str] = []
        self._blamed: int | None = None

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._members)

    def phase(self, name: str) -> None:
        self._phase = name

    # --- talking ---------------------------------------------------------------------------------

    def gather(self, message: bytes) -> list[bytes] | None:
        key = self._next("gather")
        if self._rank:
            with self._reporting():
                self._check()
                self._send(f"{key}/{self._rank}", message)
            return None
        with self._reporting():
            self._check()
            others = [self._receive(f"{key}/{rank}", rank) for rank in range(1, self.size)]
            return [message, *others]

    def scatter(self, messages: Sequence[bytes] | None) -> bytes:
        key = self._next("scatter")
        if self._rank:
            with self._reporting():
                return self._receive(f"{key}/{self._rank}", 0)
        if messages is None or len(messages) != self.size:
            raise ValueError(f"the coordinator scatters one message to each rank: {self.size}")
        with self._reporting():
            self._check()
            for rank in range(1, self.size):
                self._send(f"{key}/{rank}", messages[rank])
        return messages[0]

    def broadcast(self, message: bytes | None) -> bytes:
        key = self._next("broadcast")
        if self._rank:
            with self._reporting():
                return self._receive(key, 0, keep=True)
        if message is None:
            raise ValueError("the coordinator has no message to broadcast")
        with self._reporting():
            self._check()
            self._send(key, message)
        return message

    def _next(self, call: str) -> str:
        if not self._id:
            raise RuntimeError("use a session in a with block")
        self._step += 1
        return f"{self._id}/{self._step}/{call}"

    def _send(self, key: str, message: bytes) -> None:
        pieces = split(message)
        # The first piece comes last: when it is there, so are the others.
        for number in reversed(range(len(pieces))):
            self._keys.set(f"{key}/{number}", pieces[number])
            self._posted.append(f"{key}/{number}")

    def _receive(self, key: str, sender: int, *, keep: bool = False) -> bytes:
        self._wait([f"{key}/0"], sender)
        first = self._keys.get(f"{key}/0")
        names = [f"{key}/{number}" for number in range(count(first))]
        message = join([first, *map(self._keys.get, names[1:])])
        if not keep:
            self._keys.delete(names)
        return message

    # --- failing ---------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._keys.wait([f"{self._id}/failed"], 0):
            raise self._told()

    def _wait(self, keys: list[str], rank: int) -> str:
        """The first of the keys that exists; `rank` is who should set it."""
        # The coordinator gives up before those who wait for it, as it knows who is late.
        late = self._timing.heartbeat if self._rank else 0
        self._waits = rank
        found = self._keys.wait([*keys, f"{self._id}/failed"], self._timing.deadline + late)
        self._waits = None
        if found is None:
            raise self._blame(rank, f"it did not answer within {self._timing.deadline:g} s")
        if found.endswith("/failed"):
            raise self._told()
        return found

    def _told(self) -> RankFailed:
        """The failure that some rank has posted."""
        told = json.loads(self._keys.get(f"{self._id}/failed"))
        self._blamed = told["rank"]
        told["rank"] = self._members[told["rank"]]
        return RankFailed(path=self._path, **told)

    def _blame(self, rank: int, cause: str, sign: Sign | None = None) -> RankFailed:
        """Post that a rank has not done its part; if it waits for another one itself, that one."""
        sign = sign or self._sign_of(rank)
        if sign and sign.waits not in (None, self._rank):
            rank = sign.waits if sign.waits is not None else rank
            sign = self._sign_of(rank)
        host, phase = (sign.host, sign.phase) if sign else (_NOWHERE, self._phase)
        self._post(rank, host, phase, cause)
        return self._told()

    def _sign_of(self, rank: int) -> Sign | None:
        with suppress(KeyError):
            return Sign.decode(self._keys.get(f"{self._id}/alive/{rank}"))
        return None

    def _post(self, rank: int, host: str, phase: str, cause: str) -> None:
        # The first failure stays: those that follow are most often its consequences.
        if self._id and not self._keys.wait([f"{self._id}/failed"], 0):
            told = {"rank": rank, "host": host, "phase": phase, "cause": cause}
            self._keys.set(f"{self._id}/failed", json.dumps(told).encode())

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turn errors of the store itself into what they mean."""
        try:
            yield
        except KeyError:
            self._check()  # whoever fails takes its messages back
            raise
        except ConnectionError as error:
            cause = f"the job's store, which lives with it, is out of reach: {error}"
            raise RankFailed(0, _NOWHERE, self._phase, self._path, cause) from error

    # --- meeting ---------------------------------------------------------------------------------

    def __enter__(self) -> KeySession:
        now = f"{self._group}/now/{self._rank}"
        try:
            with self._reporting():
                self._keys.set(now, f"{self._work} of {self._path}".encode())
                try:
                    if self._rank:
                        self._come()
                    else:
                        self._receive_all()
                finally:
                    self._keys.delete([now])
        except BaseException as error:
            self._fail(error)
            raise
        return self

    def _come(self) -> None:
        word = token_hex(16)
        own, answer = f"{self._base}/word/{self._rank}", f"{self._base}/answer/{word}"
        self._keys.set(own, word.encode())
        try:
            if not self._keys.wait([answer], self._timing.deadline + self._timing.heartbeat):
                cause = self._absence(0)
                raise RankFailed(self._members[0], _NOWHERE, "enter", self._path, cause)
            self._id = self._keys.get(answer).decode()
        finally:
            self._keys.delete([own, answer])
        self._live()
        self._check()

    def _receive_all(self) -> None:
        self._id = f"{self._group}/{token_hex(16)}"
        self._live()
        end = monotonic() + self._timing.deadline
        for rank in range(1, self.size):
            self._admit(rank, end)

    def _admit(self, rank: int, end: float) -> None:
        """Answer a rank until it has come in; again, if it has given up and come anew."""
        word, failed = f"{self._base}/word/{rank}", f"{self._id}/failed"
        alive = f"{self._id}/alive/{rank}"
        answered = b""
        while True:
            look = [alive, failed] if answered else [alive, failed, word]
            self._waits = rank
            found = self._keys.wait(look, max(0.0, min(_AGAIN, end - monotonic())))
            self._waits = None
            if found == alive:
                return
            if found == failed:
                raise self._told()
            if monotonic() >= end:
                given = answered and self._timing.patience < self._timing.deadline
                raise self._blame(rank, _SILENT if given else self._absence(rank))
            if self._answer(rank, answered):
                answered = self._keys.get(word)
                end = min(end, monotonic() + self._timing.patience)

    def _live(self) -> None:
        def sign() -> Sign:
            self._beat += 1
            return Sign(self._beat, socket.gethostname(), self._phase, self._waits)

        def lost(last: Sign) -> None:
            self._post(watched, last.host, last.phase, _SILENT)

        watched = (self._rank + 1) % self.size
        alive = f"{self._id}/alive"
        own, other = f"{alive}/{self._rank}", f"{alive}/{watched}"
        self._heart = Heart(self._keys, own, other, sign, lost, self._timing)
        self._heart.start()

    def _absence(self, rank: int) -> str:
        cause = f"it did not enter this {self._work} within {self._timing.deadline:g} s"
        with suppress(KeyError):
            other = self._keys.get(f"{self._group}/now/{rank}").decode()
            return f"{cause}, but waits in the {other}"
        return cause
