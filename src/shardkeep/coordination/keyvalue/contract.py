"""What sessions ask of the job's key-value store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

__all__ = ["KeyValueStore"]


class KeyValueStore(Protocol):
    """A key-value store that all ranks share, through this rank's own client.

    The store must be linearizable: if one rank sets a key and then another one, every rank that
    finds the second finds the first, too.

    Several threads use it at once (sessions and their heartbeats). No call may hold up another one
    for longer than a message takes.

    Every method raises `ConnectionError` if the store is out of reach.
    """

    def set(self, key: str, value: bytes) -> None:
        """Set or replace a value."""
        ...

    def get(self, key: str) -> bytes:
        """Return the value of an existing key; it is never empty.

        Raises:
            KeyError: the key does not exist, or was just removed.
        """
        ...

    def wait(self, keys: Sequence[str], timeout: float) -> str | None:
        """Return the first of the keys that exists, as soon as one does.

        Args:
            keys: in order of preference.
            timeout: seconds after which None is returned. Zero or less looks once, without waiting.
        """
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove keys. Keys that do not exist are ignored."""
        ...
