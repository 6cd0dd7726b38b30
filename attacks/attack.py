"""What an attack is, and where it is put."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from attacks import pickles as p

__all__ = [
    "CANARY",
    "COMMAND",
    "Attack",
    "Attacks",
    "in_item",
    "in_metadata",
    "in_object",
    "nested",
]

CANARY = "executed"
"""A file of this name appears in the current folder if code from a checkpoint runs."""

COMMAND = f"touch {CANARY}"


@dataclass(frozen=True)
class Attack:
    """A malicious checkpoint.

    Attributes:
        build: writes it into an empty folder.
        error: what a message must match; "" where it opens, inert.
        what: what it tries, in one sentence.
    """

    build: Callable[[Path], None]
    error: str
    what: str


Attacks = Iterator[tuple[str, Attack]]


def in_object(pickle: bytes) -> Callable[[Path], None]:
    """In the pickle of an object."""
    return lambda folder: p.with_object(folder, p.PROTOCOL + pickle + p.STOP)


def in_metadata(data: bytes) -> Callable[[Path], None]:
    """As `.metadata`."""
    return lambda folder: p.with_metadata(folder, data)


def in_item(item: bytes, entry: bytes = b"", **more: bytes) -> Callable[[Path], None]:
    """As the item of a tensor."""
    return lambda folder: p.with_tensor(folder, item, entry, **more)


def nested(count: int) -> bytes:
    """A tuple of two of the tuple before it, and so on: 2 ** count items in `count` objects."""
    return p.NONE + b"2\x86" * count
