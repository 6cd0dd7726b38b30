"""Ranges of files, merged to few reads, and error texts about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from shardkeep.errors import Damaged
from shardkeep.stores.contract import Store

__all__ = [
    "MISSING",
    "MergedRead",
    "WantedRange",
    "describe_mismatch",
    "describe_short_file",
    "fetch",
    "fetch_steps",
    "merge_ranges",
]

MISSING = "the file is missing"


class WantedRange(NamedTuple):
    """Bytes `low` to `high` of a file, and the caller's row that needs them."""

    file: str
    low: int
    high: int
    use: int


class MergedRead(NamedTuple):
    """One read that serves neighbouring ranges, which are sorted by their start."""

    file: str
    low: int
    high: int
    wants: list[WantedRange]


def merge_ranges(wants: Iterable[WantedRange], gap: int, limit: int) -> Iterator[MergedRead]:
    """Merge ranges that are at most `gap` bytes apart into reads of at most `limit` bytes.

    The reads are sorted by file and position.
    """
    current: list[WantedRange] = []
    low = high = 0
    for want in sorted(wants):
        far = want.low - high > gap or want.high - low > limit
        if current and (far or want.file != current[0].file):
            yield MergedRead(current[0].file, low, high, current)
            current = []
        if not current:
            low = high = want.low
        current.append(want)
        high = max(high, want.high)
    if current:
        yield MergedRead(current[0].file, low, high, current)


def fetch(store: Store, file: str, offset: int, into: memoryview, name: str | None) -> int:
    """Fill `into` from `offset` on, and return the bytes read: fewer where the file ends.

    Raises:
        Damaged: the file is missing. The error names the tensor `name`.
    """
    step = max(1, len(into))
    return max(fetch_steps(store, file, offset, into, name, step=step), default=0)


def fetch_steps(
    store: Store,
    file: str,
    offset: int,
    into: memoryview,
    name: str | None,
    *,
    step: int,
    keep: bool = False,
) -> Iterator[int]:
    """Fill `into` from `offset` on, and yield how many bytes were read so far.

    If the store supports it, that is about every `step` bytes. `keep` tells it that other processes
    need the same bytes (`stores.abilities.SupportsReadSteps`).
    """
    in_steps = getattr(store, "read_steps", None)
    try:
        if in_steps is None:
            yield store.read_into(file, offset, into)
        else:
            yield from in_steps(file, offset, into, step, keep=keep)
    except FileNotFoundError:
        raise Damaged(MISSING, file=file, name=name) from None


def describe_mismatch(found: int, expected: int) -> str:
    """Return the error text for bytes with a wrong CRC-32."""
    return f"its bytes have CRC-32 {found:08x}, not {expected:08x}"


def describe_short_file(end: int, wanted: int) -> str:
    """Return the error text for a file that ends before its data."""
    return f"the file ends at byte {end}, but its data go on to {wanted}"
