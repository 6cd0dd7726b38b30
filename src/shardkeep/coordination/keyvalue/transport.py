"""What one session keeps in the job's key-value store: key names, messages in pieces, deletion.

Nothing here knows what a missing key means, or which rank should have set it: that is the protocol
(see `session` and `entry`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache

from shardkeep.coordination.keyvalue.contract import KeyValueStore
from shardkeep.coordination.keyvalue.framing import join_pieces, piece_count, split_into_pieces

__all__ = ["SessionTransport"]


class SessionTransport:
    """One rank's access to the keys of one session.

    Args:
        keys: the job's key-value store.
        scope: sets jobs or restarts apart that share a store.
        members: the global ranks of the session.
        name: the texts that ranks of the same session agree on before they enter.

    Attributes:
        keys: the store.
        session_id: the prefix of all keys of the session; empty until this rank knows it.
    """

    def __init__(
        self,
        keys: KeyValueStore,
        scope: str,
        members: tuple[int, ...] | range,
        name: Sequence[str],
    ) -> None:
        self.keys = keys
        self.session_id = ""
        self._group = _group_prefix(scope, members)
        self._entrance = f"{self._group}/{_digest(*name)}"
        self._posted: list[str] = []

    # --- names of keys: before this rank is in the session ---------------------------------------

    def new_session_id(self, token: str) -> str:
        return f"{self._group}/{token}"

    def entering_key(self, rank: int) -> str:
        """The key that says which session a rank waits to enter."""
        return f"{self._group}/entering/{rank}"

    def request_key(self, rank: int) -> str:
        """The key of a rank's request to enter."""
        return f"{self._entrance}/request/{rank}"

    def answer_key(self, token: str) -> str:
        """The key of the coordinator's answer to the request with this token."""
        return f"{self._entrance}/answer/{token}"

    def missed_key(self, rank: int) -> str:
        """The key of the failure of a session that a rank has not entered yet."""
        return f"{self._entrance}/missed/{rank}"

    # --- names of keys: in the session -----------------------------------------------------------

    @property
    def failure_key(self) -> str:
        return f"{self.session_id}/failed"

    @property
    def hosts_key(self) -> str:
        return f"{self.session_id}/hosts"

    def heartbeat_key(self, rank: int) -> str:
        return f"{self.session_id}/heartbeat/{rank}"

    def left_key(self, rank: int) -> str:
        return f"{self.session_id}/left/{rank}"

    def message_key(self, number: int, call: str, rank: int | None = None) -> str:
        """The key of a message: of the n-th call, from or to a rank unless it is for all."""
        key = f"{self.session_id}/{number}/{call}"
        return key if rank is None else f"{key}/{rank}"

    # --- values ----------------------------------------------------------------------------------

    def set(self, key: str, value: bytes) -> None:
        self.keys.set(key, value)

    def post(self, key: str, value: bytes) -> None:
        """Set a value that `delete_posted` removes."""
        self.keys.set(key, value)
        self._posted.append(key)

    def get(self, key: str) -> bytes:
        return self.keys.get(key)

    def peek(self, key: str) -> bytes | None:
        """Return the value of a key, None if there is none (any more). Does not wait."""
        with suppress(KeyError):
            return self.keys.get(key) if self.exists(key) else None
        return None

    def exists(self, key: str) -> bool:
        return self.keys.wait([key], 0) is not None

    def wait(self, keys: Sequence[str], timeout: float) -> str | None:
        """Return the first of the keys that exists, None after the timeout."""
        return self.keys.wait(keys, max(0.0, timeout))

    def delete(self, keys: Iterable[str]) -> None:
        self.keys.delete(keys)

    # --- messages --------------------------------------------------------------------------------

    def arrival_key(self, message: str) -> str:
        """Return the key whose existence says that the whole message is in the store."""
        return f"{message}/0"

    def send(self, key: str, message: bytes) -> None:
        """Put a message into the store, in pieces."""
        pieces = split_into_pieces(message)
        # The first piece is set last: when it exists, so do the others.
        for number in reversed(range(len(pieces))):
            self.post(f"{key}/{number}", pieces[number])

    def receive(self, key: str, *, keep: bool = False) -> bytes:
        """Return a message that has arrived, and remove it unless others are to read it, too.

        Raises:
            KeyError: its sender took it back.
        """
        first = self.keys.get(self.arrival_key(key))
        pieces = [f"{key}/{number}" for number in range(piece_count(first))]
        message = join_pieces([first, *map(self.keys.get, pieces[1:])])
        if not keep:
            self.keys.delete(pieces)
        return message

    # --- deletion --------------------------------------------------------------------------------

    def delete_posted(self) -> None:
        """Remove what this rank has posted and sent."""
        self.keys.delete(self._posted)

    def delete_session(self, size: int) -> None:
        """Remove what is left of the session. For the coordinator, when all ranks have left."""
        self.delete_posted()
        for rank in range(size):
            self.keys.delete([self.heartbeat_key(rank), self.left_key(rank)])
        self.keys.delete([self.failure_key])


@lru_cache(maxsize=16)
def _group_prefix(scope: str, members: tuple[int, ...] | range) -> str:
    """Cached, as thousands of simulated ranks would spend their time here."""
    return f"shardkeep/{_digest(scope, *map(str, members))}"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
