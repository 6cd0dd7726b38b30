"""Where checkpoints lie: folders of files, by relative names (`stores.contract.Store`)."""

from __future__ import annotations

import os

from shardkeep.settings import check_max_host_memory
from shardkeep.stores.contract import Store
from shardkeep.stores.local.store import LocalStore
from shardkeep.stores.memory import MemoryStore

__all__ = ["LocalStore", "MemoryStore", "store_at"]


def store_at(path: str | os.PathLike[str] | Store, *, budget: int | None = None) -> Store:
    """The store of a local path, with a `budget` for its buffers; a store is returned as it is.

    Raises:
        ValueError: a URL, which no store here serves, or a budget that is no number of bytes.
        TypeError: neither a path nor a store.
    """
    check_max_host_memory(budget)
    if isinstance(path, (str, os.PathLike)):
        text = os.fspath(path)
        if "://" in text:
            raise ValueError(f"no store serves {text!r}: give a local path or a Store")
        return LocalStore(text, budget=budget)
    if isinstance(path, Store):
        return path
    raise TypeError(f"expected a path or a Store, not {type(path).__name__}")
