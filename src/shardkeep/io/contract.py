"""What the writing of files needs from its caller: the bytes of payloads."""

from __future__ import annotations

from typing import Protocol

from shardkeep.types import I64

__all__ = ["Payloads"]


class Payloads(Protocol):
    """The bytes of many payloads, wherever they are. Safe to use from several threads."""

    addresses: I64
    """[N] where each payload lies in memory, all of it in order; 0 for one that does not."""

    def copy(self, row: int, start: int, nbytes: int, address: int) -> None:
        """Copy bytes of one payload, one or more, from its byte `start` on, to an address."""
        ...
