"""Payloads that are contiguous bytes in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardkeep.io.arena import copy_memory
from shardkeep.io.contract import Payloads
from shardkeep.types import I64

__all__ = ["BytesPayloads", "MemoryPayloads", "address_of"]


def address_of(data: memoryview | bytes) -> int:
    """Return the address of contiguous bytes; 0 if there are none."""
    address: int = np.frombuffer(data, np.uint8).ctypes.data if len(data) else 0
    return address


class MemoryPayloads(Payloads):
    """Payloads at given addresses, whose memory the caller keeps alive.

    Args:
        addresses: [N] address of each payload.
    """

    def __init__(self, addresses: I64) -> None:
        self.addresses = addresses
        self._addresses: list[int] = addresses.tolist()

    def copy(self, row: int, start: int, nbytes: int, address: int) -> None:
        copy_memory(address, self._addresses[row] + start, nbytes)


class BytesPayloads(MemoryPayloads):
    """Payloads in buffers, which this object keeps alive.

    Args:
        buffers: [N] the contiguous bytes of each payload.
    """

    def __init__(self, buffers: Sequence[memoryview | bytes]) -> None:
        self._buffers = buffers
        self.nbytes = np.array([len(data) for data in buffers], np.int64)
        """[N] bytes of each payload."""
        super().__init__(np.array([address_of(data) for data in buffers], np.int64))
