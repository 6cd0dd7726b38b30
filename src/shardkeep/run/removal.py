"""Removal of checkpoints, in an order that never leaves an incomplete one that looks complete.

The commit record is removed first, durably, and then the files that it names. So a crash leaves a
folder without a committed checkpoint, whose files are garbage like those of dead saves.
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
    """Remove the checkpoint in a folder, and the folder if it is then empty.

    Args:
        root: The store that contains the folder.
        folder: The name of the folder; not a symbolic link.

    Returns:
        False if nothing was removed, because the metadata cannot be read or names no files.
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
    """Remove what dead saves and removals left in a folder without a committed checkpoint.

    Files of live saves stay, and so do files that Shardkeep did not write.

    Args:
        root: The store that contains the folder.
        folder: The name of the folder; not a symbolic link.
    """
    store = subfolder(root, folder)
    # At infinite time every lease has expired, so this tells cheaply whether there can be garbage.
    if find_garbage(store, lambda: math.inf):
        with Lease(store, commit.new_id()) as lease:
            lease.take()
            collect_garbage(store, lease)
    remove_folder(root, folder)
