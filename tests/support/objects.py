"""An object store: no rename, no folders, no sync; a put or a removal is one step, seen at once.

It notes what each rank changes, so that all that a kill may leave can be enumerated.
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
        round: how many times the rank had told the store that all of its files are there.
    """

    rank: str
    round: int
    name: str
    data: bytes | None


class ObjectStore(MemoryStore):
    """Objects appear whole, when they are put; a new one only if nothing has its name."""

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
        """Nothing to do; but after this a rank reports."""
        rank = threading.current_thread().name
        self._rounds[rank] = self._rounds.get(rank, 0) + 1

    def _note(self, name: str, data: bytes | None) -> None:
        rank = threading.current_thread().name
        self.changes.append(Change(rank, self._rounds.get(rank, 0), name, data))


def cuts(changes: list[Change], before: Files) -> Iterator[tuple[list[Change], Files]]:
    """Everything that may be there when all ranks are killed: what was done, and the objects.

    Each rank is cut off anywhere. Only what waits for others is bound to them: nobody writes before
    the first change of all (the lease), and who goes on after its first round has been told that
    all have ended theirs.
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
