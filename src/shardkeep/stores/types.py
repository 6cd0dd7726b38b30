"""Values that stores take and return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Buffer", "FileInfo", "IfMatch", "Listing", "PutMode", "StoreHints"]

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class FileInfo:
    """Facts about one file: its size in bytes, its version, when it was last written.

    Attributes:
        size: Its length in bytes.
        version: A text that changes whenever the file is replaced (an ETag).
        modified: Seconds since the epoch by the store's own clock; None if unknown.
    """

    size: int
    version: str
    modified: float | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """Names below a prefix, in no order: of files, and of common prefixes, which end in "/"."""

    files: tuple[str, ...]
    prefixes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoreHints:
    """How a store is best used.

    Attributes:
        request_bytes: The size of one read or write from which on larger ones are not faster.
        concurrency: How many requests at once are useful.
        positioned_writes: Whether `abilities.SupportsPositionedWrites` can be used.
        atomic_conditions: Whether the backend itself enforces the conditions of `put`. Where it
            does not, another process can write between the check and the write.
    """

    request_bytes: int = 4 << 20
    concurrency: int = 4
    positioned_writes: bool = False
    atomic_conditions: bool = True


@dataclass(frozen=True, slots=True)
class IfMatch:
    """The condition that a file still has this version (`FileInfo.version`)."""

    version: str


PutMode = Literal["create", "replace"] | IfMatch
