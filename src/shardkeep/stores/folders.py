"""Folders of a store, also where names alone make them: in memory, in object stores."""

from __future__ import annotations

from collections.abc import Iterator

from shardkeep.stores.contract import Buffer, Folders, Sink, Store
from shardkeep.stores.names import checked

__all__ = ["Below", "below", "drop", "folders_of"]


def folders_of(store: Store, *, links: bool = True) -> list[str]:
    """The names of the folders right below, sorted; `links`: those that lead to one, too."""
    if isinstance(store, Folders):
        return sorted(store.folders(links=links))
    return sorted({name.split("/", 1)[0] for name in store.names() if "/" in name})


def below(store: Store, folder: str) -> Store:
    """One folder of a store, which need not exist yet."""
    return store.below(folder) if isinstance(store, Folders) else Below(store, folder)


def drop(store: Store, folder: str) -> None:
    """Remove a folder if it is one and is empty."""
    if isinstance(store, Folders):
        store.drop(folder)


class Below(Store):
    """What a store has below a folder: every name goes on to it with the folder's in front."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store, self._folder = store, folder

    @property
    def url(self) -> str:
        return f"{self._store.url}/{self._folder}"

    def names(self) -> Iterator[str]:
        start = f"{self._folder}/"
        for name in self._store.names():
            if name.startswith(start):
                yield name[len(start) :]

    def size(self, name: str) -> int:
        return self._store.size(self._full(name))

    def read(self, name: str, offset: int, length: int) -> bytes:
        return self._store.read(self._full(name), offset, length)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        return self._store.read_into(self._full(name), offset, buffer)

    def create(self, name: str) -> Sink:
        return self._store.create(self._full(name))

    def publish(self, name: str, data: Buffer) -> None:
        self._store.publish(self._full(name), data)

    def remove(self, name: str) -> None:
        self._store.remove(self._full(name))

    def sync(self) -> None:
        self._store.sync()

    def __repr__(self) -> str:
        return f"Below({self._store!r}, {self._folder!r})"

    def _full(self, name: str) -> str:
        return f"{self._folder}/{checked(name)}"
