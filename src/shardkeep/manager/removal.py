"""Steps go in an order in which no crash leaves half of one that looks whole.

First the commit record, durably; only then what it names. So what a crash leaves behind is a folder
in which nothing is committed.
"""

from __future__ import annotations

from shardkeep import commit
from shardkeep.contracts import Store
from shardkeep.stores.folders import below, drop

__all__ = ["remove"]


def remove(root: Store, folder: str) -> bool:
    """Remove the checkpoint in a folder, and the folder if nothing else is in it.

    Args:
        root: where the folder is.
        folder: its name; not a link.

    Returns:
        False if its metadata can't be read, or names no files: what is not understood stays.
    """
    store = below(root, folder)
    files = commit.files_of(store)
    if not files:
        return False
    store.remove(commit.METADATA)
    store.sync()
    for name in sorted(files - {commit.METADATA}):
        store.remove(name)
    drop(root, folder)
    return True
