"""A `FileSystemBase` of torch's as a store."""

from __future__ import annotations

from typing import Any

from shardkeep.contracts import Store
from shardkeep.stores import store_at

__all__ = ["store_of"]


def store_of(storage: Any) -> Store:
    """The store that a reader or writer of files works on."""
    return store_at(storage.path)
