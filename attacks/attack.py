"""The description of an attack, and helpers that place it in a checkpoint."""

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
        build: writes the checkpoint into an empty folder.
        error: a pattern of the error message; "" if the checkpoint opens as inert data.
        what: the attempt, in one sentence.
    """

    build: Callable[[Path], None]
    error: str
    what: str


Attacks = Iterator[tuple[str, Attack]]


def in_object(pickle: bytes) -> Callable[[Path], None]:
    """Return a builder with this pickle as an object."""
    return lambda folder: p.with_object(folder, p.PROTOCOL + pickle + p.STOP)


def in_metadata(data: bytes) -> Callable[[Path], None]:
    """Return a builder with these bytes as `.metadata`."""
    return lambda folder: p.with_metadata(folder, data)


def in_item(item: bytes, entry: bytes = b"", **more: bytes) -> Callable[[Path], None]:
    """Return a builder with these bytes as the item of a tensor."""
    return lambda folder: p.with_tensor(folder, item, entry, **more)


def nested(count: int) -> bytes:
    """Return a pickle of nested pairs of one tuple: 2 ** count items in `count` objects."""
    return p.NONE + b"2\x86" * count
