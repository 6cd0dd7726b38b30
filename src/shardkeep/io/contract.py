"""The interface through which file writers access the bytes of payloads."""

from __future__ import annotations

from typing import Protocol

from shardkeep.types import I64

__all__ = ["Payloads"]


class Payloads(Protocol):
    """The bytes of many payloads, in any memory. Several threads can use it at a time."""

    addresses: I64
    """[N] address of each payload that is contiguous in CPU memory; 0 for the others."""

    def copy(self, row: int, start: int, nbytes: int, address: int) -> None:
        """Copy one or more bytes of a payload, from its byte `start` on, to an address."""
        ...
