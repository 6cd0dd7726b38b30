"""The names and contents of all files of a store."""

from __future__ import annotations

from shardkeep.stores import MemoryStore
from shardkeep.stores.contract import Store

__all__ = ["contents_of", "names_in", "store_with"]


def names_in(store: Store) -> list[str]:
    """Return the names of all files, also of those in sub-folders, sorted."""
    return sorted(store.list(delimiter=None).files)


def contents_of(store: Store) -> dict[str, bytes]:
    """Return the content of each file by its name."""
    return {name: store.get_range(name, 0, store.head(name).size) for name in names_in(store)}


def store_with(files: dict[str, bytes]) -> MemoryStore:
    """Return a store in memory that holds these files."""
    return MemoryStore(files=files)
