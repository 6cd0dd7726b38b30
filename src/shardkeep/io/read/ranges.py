"""Ranges of files, put together to few reads; and what goes wrong with them, in words."""

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
    """Bytes `low` to `high` of a file, and what they are for: a row of the caller's."""

    file: str
    low: int
    high: int
    use: int


class MergedRead(NamedTuple):
    """One read that serves neighbouring wants, sorted by where they begin."""

    file: str
    low: int
    high: int
    wants: list[WantedRange]


def merge_ranges(wants: Iterable[WantedRange], gap: int, limit: int) -> Iterator[MergedRead]:
    """Join wants that are at most `gap` bytes apart, as long as a read stays within `limit`.

    Reads come sorted by file and position.
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
    """Fill `into` from `offset` on; the bytes read are fewer where the file ends.

    Raises:
        Damaged: the file is missing; `name` is the tensor that needs it.
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
    """The same, yielding how many bytes are there: every `step` or so, if the store can.

    `keep` says that others want the same bytes (`stores.abilities.SupportsReadSteps`).
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
    """What to say of bytes whose CRC-32 is not what it should be."""
    return f"its bytes have CRC-32 {found:08x}, not {expected:08x}"


def describe_short_file(end: int, wanted: int) -> str:
    """What to say of a file that ends before its data do."""
    return f"the file ends at byte {end}, but its data go on to {wanted}"
