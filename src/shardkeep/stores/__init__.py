"""Stores: where checkpoints are kept, as folders of files (`stores.contract.Store`)."""

from __future__ import annotations

import os

from shardkeep.settings import check_max_host_memory
from shardkeep.stores.contract import Store
from shardkeep.stores.local.store import LocalStore
from shardkeep.stores.memory import MemoryStore

__all__ = ["LocalStore", "MemoryStore", "open_store"]


def open_store(path: str | os.PathLike[str] | Store, *, budget: int | None = None) -> Store:
    """Return the store of a local path; a store is returned as it is.

    Args:
        path: A local path, or a store.
        budget: How many bytes of memory the buffers of a new store may take.

    Raises:
        ValueError: The path is a URL, which no store serves, or the budget is not a number of
            bytes.
        TypeError: The path is neither a path nor a store.
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
