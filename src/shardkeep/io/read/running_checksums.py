"""Payloads with one CRC-32 for all their bytes: taken piece by piece, compared when all is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

from shardkeep.errors import Damaged
from shardkeep.io.checksums import combine
from shardkeep.io.read.ranges import describe_mismatch
from shardkeep.io.read.requests import ChunkCopy
from shardkeep.plan.reads import ChunkSource

__all__ = ["RunningChecksums"]

_Payload: TypeAlias = tuple[str, int, int]
"""File, first byte, bytes."""


class RunningChecksums:
    """What is known of the payloads that some copies read; safe to use from several threads.

    Only what is read in full can be compared: of a part of a payload nothing is known.

    Args:
        copies: everything that will be read.
        verify: False compares nothing, and so everything is unchecked.
    """

    def __init__(self, copies: Sequence[ChunkCopy], verify: bool) -> None:
        self._copies, self._verify = copies, verify
        needed = Counter[_Payload]()
        for copy in copies:
            if _has_one(copy.source):
                needed[_payload(copy.source)] += copy.into.nbytes
        self._parts: dict[_Payload, dict[int, tuple[int, int]]] = {
            payload: {} for payload, nbytes in needed.items() if verify and nbytes >= payload[2]
        }
        """Of each payload that may be read in full: first byte -> length and CRC-32."""

    def wants(self, source: ChunkSource) -> bool:
        """Whether the CRC-32 of what is read of it is asked for."""
        return bool(self._parts) and _payload(source) in self._parts

    def add(self, source: ChunkSource, low: int, high: int, crc: int) -> None:
        """Bytes `low` to `high` of its file have this CRC-32."""
        self._parts[_payload(source)][low] = high - low, crc

    def compare(self) -> list[ChunkCopy]:
        """After all is read: the copies of which not all was compared with a digest.

        Raises:
            Damaged: a payload does not have its CRC-32.
        """
        whole = {payload: _whole(payload, parts) for payload, parts in self._parts.items()}
        unchecked = []
        for copy in self._copies:
            source = copy.source
            found = whole.get(_payload(source)) if _has_one(source) else None
            if found is not None and source.crc is not None and found != source.crc:
                first, nbytes = source.payload
                what = f"its {nbytes} bytes at {first}: {describe_mismatch(found, source.crc)}"
                raise Damaged(what, file=source.file, name=copy.name)
            if not self._verify or (found is None and not _has_others(source)):
                unchecked.append(copy)
        return unchecked


def _has_one(source: ChunkSource) -> bool:
    """Whether there is a CRC-32 of its whole payload that is still to be compared."""
    return source.crc is not None and source.checksums is None and source.data is None


def _has_others(source: ChunkSource) -> bool:
    """Whether its blocks are checked on reading, or were when its bytes came into memory."""
    return source.checksums is not None or (source.data is not None and source.crc is not None)


def _payload(source: ChunkSource) -> _Payload:
    return (source.file, *source.payload)


def _whole(payload: _Payload, parts: dict[int, tuple[int, int]]) -> int | None:
    """The CRC-32 of all bytes; None if the parts do not tile them."""
    _, at, nbytes = payload
    end, crc = at + nbytes, 0
    for low in sorted(parts):
        length, part = parts[low]
        if low != at:
            return None
        crc, at = combine(crc, part, length), low + length
    return crc if at == end else None
