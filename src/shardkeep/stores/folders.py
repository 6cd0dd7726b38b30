"""Folders of a store, including stores where folders exist only as parts of file names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from shardkeep.stores.abilities import SupportsFolders
from shardkeep.stores.contract import (
    Buffer,
    FileInfo,
    Listing,
    PutMode,
    Store,
    StoreHints,
    Writer,
)
from shardkeep.stores.names import checked_name, checked_prefix

__all__ = ["PrefixStore", "list_folders", "remove_folder", "subfolder"]


def list_folders(store: Store, *, links: bool = True) -> Sequence[str]:
    """Return the names of the folders of a store, sorted.

    Args:
        store: The store.
        links: Whether to include symbolic links to folders.
    """
    found = sorted(prefix.removesuffix("/") for prefix in store.list().prefixes)
    if links or not isinstance(store, SupportsFolders):
        return found
    return [folder for folder in found if not store.is_link(folder)]


def subfolder(store: Store, folder: str) -> Store:
    """Return one folder of a store, which need not exist yet, as a store of its own."""
    if isinstance(store, SupportsFolders):
        return store.subfolder(folder)
    return PrefixStore(store, folder)


def remove_folder(store: Store, folder: str) -> None:
    """Remove a folder if it is empty; links, files and other folders stay."""
    if isinstance(store, SupportsFolders):
        store.remove_folder(folder)


class PrefixStore(Store):
    """The files of a store below a folder; the folder is prepended to each name."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store, self._prefix = store, checked_prefix(f"{folder}/")

    @property
    def url(self) -> str:
        return f"{self._store.url}/{self._prefix[:-1]}"

    @property
    def hints(self) -> StoreHints:
        hints = self._store.hints
        return StoreHints(hints.request_bytes, hints.concurrency, False, hints.atomic_conditions)

    def list(self, prefix: str = "", delimiter: Literal["/"] | None = "/") -> Listing:
        found = self._store.list(self._prefix + checked_prefix(prefix), delimiter)
        cut = len(self._prefix)
        return Listing(
            tuple(name[cut:] for name in found.files), tuple(name[cut:] for name in found.prefixes)
        )

    def head(self, name: str) -> FileInfo:
        return self._store.head(self._full(name))

    def get_range(self, name: str, start: int, length: int) -> bytes:
        return self._store.get_range(self._full(name), start, length)

    def get_ranges(
        self, name: str, starts: Sequence[int], lengths: Sequence[int]
    ) -> Sequence[bytes]:
        return self._store.get_ranges(self._full(name), starts, lengths)

    def read_into(self, name: str, start: int, buffer: memoryview) -> int:
        return self._store.read_into(self._full(name), start, buffer)

    def put(self, name: str, data: Buffer, *, mode: PutMode) -> None:
        self._store.put(self._full(name), data, mode=mode)

    def open_writer(self, name: str) -> Writer:
        return self._store.open_writer(self._full(name))

    def delete(self, name: str) -> None:
        self._store.delete(self._full(name))

    def sync(self) -> None:
        self._store.sync()

    def close(self) -> None:
        self._store.close()

    def __repr__(self) -> str:
        return f"PrefixStore({self._store!r}, {self._prefix[:-1]!r})"

    def _full(self, name: str) -> str:
        return f"{self._prefix}{checked_name(name)}"
