"""An object store without rename, folders or sync, in which each put or removal is one step.

It records the changes of each rank, so that every state that a kill may leave can be enumerated.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from shardkeep.stores import MemoryStore
from shardkeep.stores.buffered import BufferedWriter
from shardkeep.stores.contract import Buffer, PutMode, Writer

__all__ = ["Change", "ObjectStore", "cuts"]

Files = dict[str, bytes]


@dataclass(frozen=True)
class Change:
    """One step of one rank: a put, or a removal (no data).

    Attributes:
        round: how many times the rank had synced the store before.
    """

    rank: str
    round: int
    name: str
    data: bytes | None


class ObjectStore(MemoryStore):
    """A store whose objects appear whole when they are put, and that records all changes."""

    def __init__(self, files: Files | None = None) -> None:
        super().__init__("objects", files)
        self.changes: list[Change] = []
        self._changing = threading.Lock()
        self._rounds: dict[str, int] = {}

    def open_writer(self, name: str) -> Writer:
        return BufferedWriter(self, name)

    def put(self, name: str, data: Buffer, *, mode: PutMode) -> None:
        with self._changing:
            super().put(name, data, mode=mode)
            self._note(name, bytes(data))

    def delete(self, name: str) -> None:
        with self._changing:
            if name in self._files:
                super().delete(name)
                self._note(name, None)

    def sync(self) -> None:
        """Count a round: nothing needs to be synced, but the rank reports after this."""
        rank = threading.current_thread().name
        self._rounds[rank] = self._rounds.get(rank, 0) + 1

    def _note(self, name: str, data: bytes | None) -> None:
        rank = threading.current_thread().name
        self.changes.append(Change(rank, self._rounds.get(rank, 0), name, data))


def cuts(changes: list[Change], before: Files) -> Iterator[tuple[list[Change], Files]]:
    """Yield each possible state after a kill of all ranks: the completed changes, and the objects.

    Each rank may be killed anywhere, within the limits of waiting. No rank writes before the first
    change of all, which is the lease. A rank continues after its first round only once all ranks
    have completed theirs.
    """
    first, rest = changes[0], changes[1:]
    yield [], dict(before)
    ranks = sorted({one.rank for one in rest})
    of = {rank: [one for one in rest if one.rank == rank] for rank in ranks}
    for lengths in product(*(range(len(of[rank]) + 1) for rank in ranks)):
        done = [one for rank, n in zip(ranks, lengths, strict=True) for one in of[rank][:n]]
        left = [one for rank, n in zip(ranks, lengths, strict=True) for one in of[rank][n:]]
        if any(one.round for one in done) and any(not one.round for one in left):
            continue
        done.sort(key=changes.index)
        files = dict(before)
        for one in [first, *done]:
            if one.data is None:
                files.pop(one.name, None)
            else:
                files[one.name] = one.data
        yield [first, *done], files
