"""Ranges of files, put together to few reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, NamedTuple, TypeVar

from shardkeep.contracts import Store
from shardkeep.errors import Damaged

__all__ = ["Read", "Want", "fetch", "gather"]

T = TypeVar("T")


class Want(NamedTuple, Generic[T]):
    """Bytes `low` to `high` of a file, and what they are for."""

    file: str
    low: int
    high: int
    use: T


class Read(NamedTuple, Generic[T]):
    """One read that serves neighbouring wants, sorted by where they begin."""

    file: str
    low: int
    high: int
    wants: list[Want[T]]


def gather(wants: Iterable[Want[T]], gap: int, limit: int) -> Iterator[Read[T]]:
    """Join wants that are at most `gap` bytes apart, as long as a read stays within `limit`.

    Reads come sorted by file and position.
    """
    current: Read[T] | None = None
    for want in sorted(wants, key=lambda want: (want.file, want.low)):
        if (
            current is not None
            and want.file == current.file
            and want.low - current.high <= gap
            and want.high - current.low <= limit
        ):
            current.wants.append(want)
            if want.high > current.high:
                current = current._replace(high=want.high)
        else:
            if current is not None:
                yield current
            current = Read(want.file, want.low, want.high, [want])
    if current is not None:
        yield current


def fetch(store: Store, file: str, offset: int, into: memoryview, name: str | None) -> int:
    """Fill `into` from `offset` on; the bytes read are fewer where the file ends.

    Raises:
        Damaged: the file is missing; `name` is the tensor that needs it.
    """
    try:
        return store.read_into(file, offset, into)
    except FileNotFoundError:
        raise Damaged("the file is missing", file=file, name=name) from None
