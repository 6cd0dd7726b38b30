"""What dead saves left behind: found by name and lease, and removed.

Only names that carry the id of a save are looked at. Of those, a file stays if a commit record
names it or if its save may be alive. The order in which this is found out matters, as other saves
go on meanwhile: files first, then leases, then commit records. A save whose files are in the first
list has a lease in the second one, or has ended before: then, if it was committed, the third says
so.
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
_LEASE_TO_BE = re.compile(r"(\.lease_[0-9a-f]{32}\.json)\.[0-9a-f]{16}\.tmp")
_RECORD_TO_BE = re.compile(r"\.metadata\.[0-9a-f]{16}\.tmp")
"""A commit record that was not renamed. It does not say whose it is."""


@dataclass(frozen=True, slots=True)
class OrphanedFile:
    """A file that a dead save left.

    Attributes:
        name: in its store.
        nbytes: its size.
        save_id: of the save; empty where the name does not say.
    """

    name: str
    nbytes: int
    save_id: str


def find_garbage(
    store: Store, time: Callable[[], float | None], *, but: str | None = None
) -> list[OrphanedFile]:
    """The files of dead saves; none if a commit record can't be read.

    Args:
        store: the folder.
        time: what time it is for the store, as `Lease.time`.
        but: a save whose files need not be looked at.

    Raises:
        OSError: from the store.
    """
    files = {
        name: save_id for name in store.list().files if (save_id := _save_id(name)) is not None
    }
    if not set(files.values()) - {but}:
        return []
    leases = [name for name in store.list().files if lease_save_id(name)]
    alive = living(store, leases, time) | {but}
    named = _named(store)
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
    """Remove what dead saves left; what was removed.

    Args:
        store: the folder.
        lease: of whoever collects, taken.

    Raises:
        LeaseLost, OSError: from the store.
    """
    found = find_garbage(store, lease.time, but=lease.save_id)
    # The lease first: a save that is not dead after all sees by it what happened.
    for one in sorted(found, key=lambda one: (lease_save_id(one.name) is None, one.name)):
        store.delete(one.name)
    return found


def _save_id(name: str) -> str | None:
    """Whose file it is: "" if that can't be said, None if it is not a save's."""
    if parts := data_file_parts(name):
        return parts[1] if _ID.fullmatch(parts[1]) else None
    if match := _LEASE_TO_BE.fullmatch(name):
        return lease_save_id(match[1])
    if _RECORD_TO_BE.fullmatch(name):
        return ""
    return manifest_save_id(name) or lease_save_id(name)


def _named(store: Store) -> frozenset[str] | None:
    """All files that commit records name; None if one of them can't be read."""
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
