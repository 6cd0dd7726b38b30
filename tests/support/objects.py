"""An object store: no rename, no folders, no sync; a put or a removal is one step, seen at once.

It notes what each rank changes, so that all that a kill may leave can be enumerated.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from types import TracebackType

from shardkeep.stores import MemoryStore
from shardkeep.stores.contract import Buffer, Sink

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
        super().__init__("objects")
        self._files.update({name: bytearray(data) for name, data in (files or {}).items()})
        self.changes: list[Change] = []
        self._rounds: dict[str, int] = {}

    def create(self, name: str) -> Sink:  # type: ignore[override]
        if name in self._files:
            raise FileExistsError(errno.EEXIST, "exists", name)
        return _Upload(self, name)

    def publish(self, name: str, data: Buffer) -> None:
        with self._lock:
            self._note(name, bytes(data))
            self._files[name] = bytearray(data)

    def put_new(self, name: str, data: bytes) -> None:
        """If-None-Match: the store itself refuses a name that is taken."""
        with self._lock:
            if name in self._files:
                raise FileExistsError(errno.EEXIST, "exists", name)
            self._note(name, data)
            self._files[name] = bytearray(data)

    def remove(self, name: str) -> None:
        with self._lock:
            if self._files.pop(name, None) is not None:
                self._note(name, None)

    def sync(self) -> None:
        """Nothing to do; but after this a rank reports."""
        rank = threading.current_thread().name
        self._rounds[rank] = self._rounds.get(rank, 0) + 1

    def _note(self, name: str, data: bytes | None) -> None:
        rank = threading.current_thread().name
        self.changes.append(Change(rank, self._rounds.get(rank, 0), name, data))


class _Upload(Sink):
    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store, self._name, self._parts = store, name, bytearray()

    def write(self, data: Buffer) -> None:
        self._parts += memoryview(data).cast("B")

    def __enter__(self) -> _Upload:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._store.put_new(self._name, bytes(self._parts))


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
