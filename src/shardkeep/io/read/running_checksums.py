"""CRC-32 of whole payloads, computed piece by piece and compared once all is read."""

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
    """Checksums of the payloads that some copies read. Several threads can use it at a time.

    Only a payload that is read in full can be compared, as there is one CRC-32 for all its bytes.

    Args:
        copies: all copies that will be read.
        verify: False compares nothing, so that everything counts as unchecked.
    """

    def __init__(self, copies: Sequence[ChunkCopy], verify: bool) -> None:
        self._copies, self._verify = copies, verify
        needed = Counter[_Payload]()
        for copy in copies:
            if _has_payload_crc(copy.source):
                needed[_payload(copy.source)] += copy.into.nbytes
        self._parts: dict[_Payload, dict[int, tuple[int, int]]] = {
            payload: {} for payload, nbytes in needed.items() if verify and nbytes >= payload[2]
        }
        """For each payload that may be read in full: first byte -> length and CRC-32."""

    def wants(self, source: ChunkSource) -> bool:
        """Return whether the CRC-32 of bytes of this source is needed."""
        return bool(self._parts) and _payload(source) in self._parts

    def add(self, source: ChunkSource, low: int, high: int, crc: int) -> None:
        """Record the CRC-32 of bytes `low` to `high` of the source's file."""
        self._parts[_payload(source)][low] = high - low, crc

    def compare(self) -> list[ChunkCopy]:
        """Compare all payloads, and return the copies with bytes that had no checksum.

        Call it once everything is read.

        Raises:
            Damaged: a payload does not match its CRC-32.
        """
        whole = {payload: _whole(payload, parts) for payload, parts in self._parts.items()}
        unchecked = []
        for copy in self._copies:
            source = copy.source
            found = whole.get(_payload(source)) if _has_payload_crc(source) else None
            if found is not None and source.crc is not None and found != source.crc:
                first, nbytes = source.payload
                what = f"its {nbytes} bytes at {first}: {describe_mismatch(found, source.crc)}"
                raise Damaged(what, file=source.file, name=copy.name)
            if not self._verify or (found is None and not _is_checked_otherwise(source)):
                unchecked.append(copy)
        return unchecked


def _has_payload_crc(source: ChunkSource) -> bool:
    """Return whether a source has a CRC-32 of its whole payload that is not compared yet."""
    return source.crc is not None and source.checksums is None and source.data is None


def _is_checked_otherwise(source: ChunkSource) -> bool:
    """Return whether a source's bytes are checked by blocks, or were checked before."""
    return source.checksums is not None or (source.data is not None and source.crc is not None)


def _payload(source: ChunkSource) -> _Payload:
    return (source.file, *source.payload)


def _whole(payload: _Payload, parts: dict[int, tuple[int, int]]) -> int | None:
    """Return the CRC-32 of all bytes; None if the parts do not tile them."""
    _, at, nbytes = payload
    end, crc = at + nbytes, 0
    for low in sorted(parts):
        length, part = parts[low]
        if low != at:
            return None
        crc, at = combine(crc, part, length), low + length
    return crc if at == end else None
