"""Detection and removal of garbage: files that dead saves left behind.

Only files whose names contain a save id are considered, and temporary files of commit records. A
file stays if a commit record names it or if its save may be alive. Other saves go on meanwhile, so
the order of the steps matters: files are listed first, then leases, then commit records. A save
with a file in the first list either has a lease in the second one or has ended before it. If it
ended with a commit, the commit record that is read last names its files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from shardkeep.checkpoint import commit
from shardkeep.checkpoint.leases import Lease, lease_save_id, living
from shardkeep.errors import NotACheckpoint, ShardkeepError
from shardkeep.filenames import data_file_parts, of_ranks
from shardkeep.format.dcp.metadata_read import read_metadata
from shardkeep.format.dcp.trailer import manifest_save_id
from shardkeep.stores.contract import Store

__all__ = ["OrphanedFile", "collect_garbage", "find_garbage"]

_ID = re.compile(r"[0-9a-f]{32}")
_TEMPORARY_LEASE = re.compile(r"(\.lease_[0-9a-f]{32}\.json)\.[0-9a-f]{16}\.tmp")
_TEMPORARY_RECORD = re.compile(r"\.metadata\.[0-9a-f]{16}\.tmp")
"""A commit record that was never renamed. Its name does not contain the save id."""


@dataclass(frozen=True, slots=True)
class OrphanedFile:
    """A file that a dead save left behind.

    Attributes:
        name: Name of the file in its store.
        nbytes: Size of the file in bytes.
        save_id: The id of the save; empty if the name does not contain it.
    """

    name: str
    nbytes: int
    save_id: str


def find_garbage(
    store: Store, time: Callable[[], float | None], *, but: str | None = None
) -> list[OrphanedFile]:
    """Return the files of dead saves; none if a commit record cannot be read.

    Args:
        store: The folder.
        time: Returns the current time by the clock of the store, as `Lease.time` does.
        but: A save whose files are left out.

    Raises:
        OSError: The store failed.
    """
    files = {
        name: save_id for name in store.list().files if (save_id := _save_id(name)) is not None
    }
    if not set(files.values()) - {but}:
        return []
    leases = [name for name in store.list().files if lease_save_id(name)]
    alive = living(store, leases, time) | {but}
    named = _recorded_files(store)
    if named is None:
        return []
    others = alive - {but}  # any of them may be about to rename its record
    dead = {
        name: save_id
        for name, save_id in files.items()
        if name not in named and save_id not in alive and not (others and not save_id)
    }
    return [
        OrphanedFile(name, size, save_id)
        for name, save_id in sorted(dead.items())
        if (size := commit.size_of(store, name)) is not None
    ]


def collect_garbage(store: Store, lease: Lease) -> list[OrphanedFile]:
    """Remove the files of dead saves, and return the files that were removed.

    Args:
        store: The folder.
        lease: The caller's lease, which must be taken.

    Raises:
        LeaseLost: Another process has taken the caller for dead.
        OSError: The store failed.
    """
    found = find_garbage(store, lease.time, but=lease.save_id)
    # Leases first: a save that is alive after all notices that its lease is gone before it commits.
    for one in sorted(found, key=lambda one: (lease_save_id(one.name) is None, one.name)):
        store.delete(one.name)
    return found


def _save_id(name: str) -> str | None:
    """Return the save id in a file name; "" if a save made it without an id, None if none did."""
    if parts := data_file_parts(name):
        return parts[1] if _ID.fullmatch(parts[1]) else None
    if match := _TEMPORARY_LEASE.fullmatch(name):
        return lease_save_id(match[1])
    if _TEMPORARY_RECORD.fullmatch(name):
        return ""
    return manifest_save_id(name) or lease_save_id(name)


def _recorded_files(store: Store) -> frozenset[str] | None:
    """Return all files that commit records name; None if one of the records cannot be read."""
    try:
        files = set(commit.committed_files(store))
        for _, name in of_ranks(store.list().files):
            data = store.get_range(name, 0, store.head(name).size)
            files.update(read_metadata(data, file=name).files)
    except NotACheckpoint:
        return frozenset()
    except ShardkeepError:
        return None
    return frozenset(files)
