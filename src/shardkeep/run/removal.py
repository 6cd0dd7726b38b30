"""Steps go in an order in which no crash leaves half of one that looks whole.

First the commit record, durably; only then what it names. So what a crash leaves behind is a folder
in which nothing is committed: what is in it belongs to nobody, and goes like what dead saves left.
"""

from __future__ import annotations

import math

from shardkeep.checkpoint import commit
from shardkeep.checkpoint.garbage import collect_garbage, find_garbage
from shardkeep.checkpoint.leases import Lease
from shardkeep.stores.contract import Store
from shardkeep.stores.folders import remove_folder, subfolder

__all__ = ["clear", "remove"]


def remove(root: Store, folder: str) -> bool:
    """Remove the checkpoint in a folder, and the folder if nothing else is in it.

    Args:
        root: where the folder is.
        folder: its name; not a link.

    Returns:
        False if its metadata can't be read, or names no files: what is not understood stays.
    """
    store = subfolder(root, folder)
    files = commit.files_of(store)
    if not files:
        return False
    store.delete(commit.METADATA)
    store.sync()
    for name in sorted(files - {commit.METADATA}):
        store.delete(name)
    remove_folder(root, folder)
    return True


def clear(root: Store, folder: str) -> None:
    """Remove what dead saves and removals left in a folder in which nothing is committed.

    Files of saves that are alive stay, and so does what no save of ours made.

    Args:
        root, folder: as of `remove`.
    """
    store = subfolder(root, folder)
    # As if it were the end of all time, when every lease is over: is there anything at all?
    if find_garbage(store, lambda: math.inf):
        with Lease(store, commit.new_id()) as lease:
            lease.take()
            collect_garbage(store, lease)
    remove_folder(root, folder)
