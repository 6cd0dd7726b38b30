"""A session over a key-value store: how ranks meet, talk, fail together and part.

**Meeting.** Each rank announces a random word of its own under a key of (scope, members, work,
path). The coordinator makes a random id for the session and answers each word with it; everything
else happens under that id. With its word a rank says its host; the coordinator publishes how many
ranks each host has. So nothing is counted: a session that some ranks never entered, or that
failed half-way on some of them, leaves nothing that a later one could mistake for its own. A word
is written and removed only by its rank, and answered under a key of its own, so an answer to an
earlier try of a rank is never read by a later one. The answered rank's first sign of life tells
that it came in. If the session fails before a slower rank has come, the coordinator leaves what
happened under `missed/rank`, so that it does not wait for those who are gone.

**Talking.** Messages are pieces under `id/step/...`. The receiver of a message for one rank removes
it; broadcasts are removed by the coordinator when all have left.

**Failing.** Whoever fails sets `id/failed`, which every wait watches. Whoever sees it raises.

**Parting.** Leaving in peace is a gather and a broadcast, then a farewell: the coordinator, whose
process may host the store, leaves last.

Ranks meet by work and path, so whatever can fail belongs inside the session: a rank that fails
before it enters, and then comes with the next state for the same path, meets the others in the
session that it missed.

Sessions may run at the same time, in different threads. A rank enters those of one work on one path
one after another, and on all ranks in the same order: a word belongs to the session that is being
entered.
"""

from __future__ import annotations

import hashlib
import json
import socket
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from secrets import token_hex
from time import monotonic
from types import TracebackType
from typing import NamedTuple

from shardkeep.coordination.contract import Session
from shardkeep.coordination.keyvalue.contract import KeyValueStore
from shardkeep.coordination.keyvalue.framing import count, join, split
from shardkeep.coordination.keyvalue.heartbeat import Heartbeat, Sign
from shardkeep.coordination.keyvalue.timeouts import Timeouts
from shardkeep.errors import RankFailed

__all__ = ["KeyValueSession"]

_NOWHERE = "an unknown host"
_LATER = 0.5
"""Seconds by which the others wait longer than the coordinator."""
_AGAIN = 1.0
"""Seconds after which the coordinator looks who else has come, or has come anew."""
_GLANCE = 0.5
"""Seconds between two looks for failures of others, where no heart looks for them."""


class _Answered(NamedTuple):
    word: bytes
    at: float

    @property
    def host(self) -> str:
        """The host that the rank named beside its random token."""
        return self.word.decode().partition(" ")[2] or _NOWHERE


class KeyValueSession(Session):
    """One rank's end of a session.

    Args:
        keys: the job's key-value store, through this rank's own client.
        rank: this rank, counted among the members.
        members: global ranks, for messages; the same on all, in the same order.
        work, path: what is done on what; the same text on all members.
        scope: sets jobs or restarts apart that share a store.
        by_path: False lets ranks meet that call the path differently; then a process has one
            session for one work at a time.
        timeouts: None takes it from the knobs.
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
    ) -> None:
        self._keys, self._rank, self._members = keys, rank, members
        self._work, self._path = work, path
        self._timeouts = timeouts or Timeouts.from_settings()
        self._group = _group(scope, members)
        self._base = f"{self._group}/{_digest(work, *([path] if by_path else []))}"
        self._id = ""
        self._heart: Heartbeat | None = None
        self._phase = "enter"
        self._waits: int | None = None
        self._host = socket.gethostname()
        self._first_host = _NOWHERE
        self._beat = 0
        self._glance = 0.0
        self._step = 0
        self._posted: list[str] = []
        self._answered: dict[int, _Answered] = {}
        self._ranks_per_host: dict[str, int] | None = None
        self._absent = False
        self._concluded = False
        self._blamed: int | None = None

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._members)

    def phase(self, name: str) -> None:
        self._phase = name
        # At once, or a rank that is killed soon would be said to have been in an earlier one.
        if self._heart is not None and self._timeouts.heartbeat_seconds:
            with suppress(ConnectionError):  # the next call meets it, too
                self._heart.tell()

    def set_path(self, path: str) -> None:
        self._path = path

    def check(self) -> None:
        heart = self._heart
        if heart is None:
            return
        with self._reporting():
            if heart.unreachable is not None:
                raise heart.unreachable
            if heart.failure is not None:
                raise self._told(heart.failure)
            if not self._timeouts.heartbeat_seconds and monotonic() >= self._glance:
                self._glance = monotonic() + _GLANCE
                self._check()

    def host(self, rank: int) -> str:
        with suppress(ConnectionError):
            if (sign := self._sign_of(rank)) is not None:
                return sign.host
        return _NOWHERE

    def ranks_on_this_host(self) -> int:
        if not self._id:
            raise RuntimeError("use a session in a with block")
        if self._ranks_per_host is None:
            key = f"{self._id}/hosts"
            with self._reporting():
                self._wait(key, 0)
                self._ranks_per_host = json.loads(self._keys.get(key))
        return self._ranks_per_host[self._host]

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

    def conclude(self) -> None:
        self._concluded = True

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
        self._wait(f"{key}/0", sender)
        first = self._keys.get(f"{key}/0")
        names = [f"{key}/{number}" for number in range(count(first))]
        message = join([first, *map(self._keys.get, names[1:])])
        if not keep:
            self._keys.delete(names)
        return message

    # --- failing ---------------------------------------------------------------------------------

    def _check(self) -> None:
        if (told := self._peek(f"{self._id}/failed")) is not None:
            raise self._told(told)

    def _wait(self, key: str, rank: int) -> None:
        """Until the key is there, which `rank` should set."""
        # The coordinator gives up before those who wait for it, as it knows who is late.
        if not self._await(
            [key], rank, self._timeouts.deadline_seconds + bool(self._rank) * _LATER
        ):
            raise self._blame(
                rank, f"it did not answer within {self._timeouts.deadline_seconds:g} s"
            )

    def _await(self, keys: list[str], rank: int, timeout: float) -> str | None:
        """The first of the keys that exists, None after the timeout; raises what others posted."""
        failed = f"{self._id}/failed"
        self._waits = rank
        found = self._keys.wait([*keys, failed], max(0.0, timeout))
        self._waits = None
        if found == failed:
            raise self._told(self._keys.get(failed))
        return found

    def _told(self, data: bytes) -> RankFailed:
        self._blamed, host, phase, cause = json.loads(data)
        return RankFailed(self._members[self._blamed], host, phase, self._path, cause)

    def _blame(self, rank: int, cause: str) -> RankFailed:
        """Post that a rank has not done its part; if it waits for another one itself, that one."""
        sign = self._sign_of(rank)
        if sign is not None and sign.waits is not None and sign.waits != self._rank:
            rank = sign.waits
            sign = self._sign_of(rank)
        host, phase = (sign.host, sign.phase) if sign else (_NOWHERE, self._phase)
        return self._told(self._post(rank, host, phase, cause))

    def _post(self, rank: int, host: str, phase: str, cause: str) -> bytes:
        """What all others are told. The first failure stays: most later ones are its children."""
        told = self._peek(f"{self._id}/failed")
        if told is None:
            told = json.dumps([rank, host, phase, cause]).encode()
            self._keys.set(f"{self._id}/failed", told)
        return told

    def _sign_of(self, rank: int) -> Sign | None:
        sign = self._peek(f"{self._id}/alive/{rank}")
        return None if sign is None else Sign.decode(sign)

    def _peek(self, key: str) -> bytes | None:
        """The value of a key that may be missing, or just be going; never waits."""
        with suppress(KeyError):
            return self._keys.get(key) if self._keys.wait([key], 0) else None
        return None

    @property
    def _silence(self) -> str:
        return f"it stopped answering: no sign of life for {self._timeouts.silence_seconds:g} s"

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turn errors of the store itself into what they mean."""
        try:
            yield
        except KeyError:
            self._check()  # a rank that fails takes its messages back
            raise
        except ConnectionError as error:
            cause = f"the job's store, which lives beside it, is out of reach: {error}"
            raise RankFailed(0, self._first_host, self._phase, self._path, cause) from error

    # --- meeting ---------------------------------------------------------------------------------

    def __enter__(self) -> KeyValueSession:
        now = f"{self._group}/now/{self._rank}"
        try:
            with self._reporting():
                self._keys.set(now, f"{self._work} of {self._path}".encode())
                try:
                    self._come() if self._rank else self._admit_all()
                finally:
                    self._keys.delete([now])
        except BaseException as error:
            self._fail(error)
            raise
        return self

    def _come(self) -> None:
        token = token_hex(16)
        own, answer = f"{self._base}/word/{self._rank}", f"{self._base}/answer/{token}"
        missed = f"{self._base}/missed/{self._rank}"
        self._keys.set(own, f"{token} {self._host}".encode())
        try:
            found = self._keys.wait([missed, answer], self._timeouts.deadline_seconds + _LATER)
            if found is None:
                cause = self._absence(0)
                raise RankFailed(self._members[0], _NOWHERE, "enter", self._path, cause)
            said = self._keys.get(found)
        finally:
            self._keys.delete([own, answer, missed])
        if found == missed:
            raise self._told(said)
        self._id, host = json.loads(said)
        if self._members[0] == 0:  # the rank that hosts the store, where a rank does
            self._first_host = host
        self._live()
        self._check()

    def _admit_all(self) -> None:
        self._id = f"{self._group}/{token_hex(16)}"
        self._live()
        end = monotonic() + self._timeouts.deadline_seconds
        # All are answered before any is waited for, or they would come in one after the other.
        for rank in range(1, self.size):
            word = f"{self._base}/word/{rank}"
            if self._await([word], rank, min(_AGAIN, end - monotonic())) is None:
                break
            self._answer(rank)
        for rank in range(1, self.size):
            self._admit(rank, end)
        hosts = [self._host, *(answered.host for answered in self._answered.values())]
        self._ranks_per_host = Counter(hosts)
        self._keys.set(f"{self._id}/hosts", json.dumps(self._ranks_per_host).encode())
        self._posted.append(f"{self._id}/hosts")

    def _admit(self, rank: int, end: float) -> None:
        """Answer a rank until it has come in; again, if it has given up and come anew."""
        alive, word = f"{self._id}/alive/{rank}", f"{self._base}/word/{rank}"
        while True:
            answered = self._answered.get(rank)
            until = end if answered is None else answered.at + self._timeouts.silence_seconds
            keys = [alive, word] if answered is None else [alive]
            found = self._await(keys, rank, min(_AGAIN, until - monotonic()))
            if found == alive:
                return
            # While this one lets us wait, the others come in, and watch each other.
            for other in [rank] if found else range(rank, self.size):
                self._answer(other)
            if found is None and monotonic() >= until and self._answered.get(rank) is answered:
                self._absent = answered is None
                raise self._blame(rank, self._absence(rank) if self._absent else self._silence)

    def _answer(self, rank: int) -> None:
        """Tell a rank the session's id, if it has said a word that is not answered yet."""
        word = self._peek(f"{self._base}/word/{rank}")
        answered = self._answered.get(rank)
        if word is None or (answered is not None and answered.word == word):
            return
        answer = f"{self._base}/answer/{word.decode().partition(' ')[0]}"
        self._keys.set(answer, json.dumps([self._id, self._host]).encode())
        self._posted.append(answer)
        self._answered[rank] = _Answered(word, monotonic())

    def _absence(self, rank: int) -> str:
        cause = f"it did not enter this {self._work} within {self._timeouts.deadline_seconds:g} s"
        other = self._peek(f"{self._group}/now/{rank}")
        return cause if other is None else f"{cause}; it waits to enter the {other.decode()}"

    def _live(self) -> None:
        """Come in: from the first sign of life on, the others know."""

        def sign() -> Sign:
            self._beat += 1
            return Sign(self._beat, self._host, self._phase, self._waits)

        def lost(last: Sign) -> None:
            self._post(watched, last.host, last.phase, self._silence)

        watched = (self._rank + 1) % self.size
        alive = f"{self._id}/alive"
        own, other = f"{alive}/{self._rank}", f"{alive}/{watched}"
        failed = f"{self._id}/failed"
        self._heart = Heartbeat(self._keys, own, other, failed, sign, lost, self._timeouts)
        self._heart.start()

    # --- parting ---------------------------------------------------------------------------------

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._concluded:
            self._part()
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
        self._part()

    def _fail(self, error: BaseException) -> None:
        if not self._id:
            return  # nobody knows of this session but us
        with suppress(ConnectionError):
            cause = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            told = self._post(self._rank, self._host, self._phase, cause)
            if self._rank:
                self._keys.delete(self._posted)
            elif not self._absent:
                # Those who have yet to enter this session learn of its end when they do. Not if it
                # ended as someone did not come in time: that rank may never come to this session,
                # and would then take the next one for it.
                for rank in set(range(1, self.size)) - set(self._answered):
                    self._keys.set(f"{self._base}/missed/{rank}", told)
        self._part()

    def _part(self) -> None:
        """Say farewell. What has been decided stays: this raises nothing about others."""
        if self._heart is not None:
            self._heart.stop()
        with suppress(ConnectionError):
            if self._rank:
                self._keys.set(f"{self._id}/bye/{self._rank}", b"")
            elif self._all_gone():
                self._keys.delete(self._posted)
                for rank in range(self.size):
                    self._keys.delete([f"{self._id}/alive/{rank}", f"{self._id}/bye/{rank}"])
                self._keys.delete([f"{self._id}/failed"])

    def _all_gone(self) -> bool:
        """Wait for all who came in, but not long: a rank can die, or be slow to notice a failure.

        The coordinator's process may host the store: if it ended at once, the others would see a
        broken connection in place of what happened.
        """
        end, gone = monotonic() + self._timeouts.silence_seconds, True
        # Last the one that is not waited for: meanwhile it, too, may say farewell.
        for rank in sorted(self._answered, key=lambda rank: rank == self._blamed):
            left = 0.0 if rank == self._blamed else max(0.0, end - monotonic())
            gone &= self._keys.wait([f"{self._id}/bye/{rank}"], left) is not None
        return gone


@lru_cache(maxsize=16)
def _group(scope: str, members: tuple[int, ...] | range) -> str:
    """Cached, as thousands of simulated ranks would spend their time here."""
    return f"shardkeep/{_digest(scope, *map(str, members))}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
