"""The commit of what a plan wrote: torch's metadata, with Shardkeep's manifest where it can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from shardkeep.checkpoint import commit
from shardkeep.checkpoint.leases import Lease
from shardkeep.dcp.bridge.metadata import index_of, is_whole, pickled, says_no_more
from shardkeep.engine.committing import manifest_header, remove_replaced
from shardkeep.errors import FormatError
from shardkeep.format.dcp.metadata_read import read_metadata
from shardkeep.format.dcp.metadata_write import metadata_bytes
from shardkeep.stores.contract import Store
from shardkeep.types import Index

__all__ = ["commit_one_rank", "publish"]

Results = Mapping[MetadataIndex, WriteResult]


def publish(
    store: Store, metadata: Any, results: Results, lease: Lease, *, ranks: int, name: str
) -> None:
    """Commit what all ranks wrote, in one step, then remove what it replaced.

    Every release of torch from 2.0 on can read it. What no index can say (classes or attributes of
    the user's own) is pickled as it is: nothing is lost, but only torch that has them reads it.

    Args:
        store: where everything is already, durably.
        metadata: with `storage_data`.
        results: those of all ranks.
        lease: the save's.
        ranks: how many wrote.
        name: the file, `.metadata` unless a writer of the user's own says otherwise.
    """
    old = commit.files_of(store)
    index = _index(metadata, results)
    if index is not None and is_whole(index) and name == commit.METADATA:
        with commit.undone_on_failure(store, lease.save_id):
            commit.publish(store, lease.save_id, index, manifest_header(ranks))
    else:
        store.put(
            name, pickled(metadata) if index is None else metadata_bytes(index), mode="replace"
        )
    if index is not None or commit.files_of(store):
        remove_replaced(store, old - {name}, lease, stacklevel=4)


def commit_one_rank(store: Store, metadata: Any, results: Results, *, rank: int, name: str) -> None:
    """Commit what one rank wrote for itself (`use_collectives=False`); see `publish`.

    There is no moment at which all ranks' files are there: they are as many commits. A `.metadata`
    of an earlier save would hide them all: the lowest rank removes it.
    """
    old = _files(store, name)
    index = _index(metadata, results)
    store.put(name, pickled(metadata) if index is None else metadata_bytes(index), mode="replace")
    for file in sorted(old - _files(store, name)):
        store.delete(file)
    if rank == 0:
        hidden = commit.files_of(store) if commit.exists(store, commit.METADATA) else frozenset()
        store.delete(commit.METADATA)
        for file in sorted(hidden):
            store.delete(file)


def _index(metadata: Any, results: Results) -> Index | None:
    """The metadata as an index; None if that would lose something."""
    try:
        index = index_of(metadata, results)
        return index if says_no_more(metadata, index) else None
    except (FormatError, AttributeError, TypeError):  # classes of the user's own
        return None


def _files(store: Store, name: str) -> frozenset[str]:
    try:
        data = store.get_range(name, 0, store.head(name).size)
        return frozenset(read_metadata(data, file=name).files)
    except (FileNotFoundError, FormatError):
        return frozenset()
