"""The commit of what a plan wrote: torch's metadata, with Shardkeep's manifest where possible."""

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

__all__ = ["commit_all_ranks", "commit_one_rank"]

Results = Mapping[MetadataIndex, WriteResult]


def commit_all_ranks(
    store: Store,
    metadata: Any,
    results: Results,
    lease: Lease,
    *,
    ranks: int,
    name: str,
    admission: commit.Admission,
) -> None:
    """Commit what all ranks wrote in one step, then remove the files that it replaces.

    Every release of torch from 2.0 on can read the result. Metadata that an index can't express
    (classes or attributes of the user's own) is pickled as it is, without a manifest; reading it
    takes a torch that has these classes.

    Args:
        store: where all data files are durable already.
        metadata: with `storage_data`.
        results: those of all ranks.
        lease: of this save.
        ranks: the number of ranks that wrote.
        name: the name of the commit record: `.metadata`, unless a writer has another.
        admission: the commit record that the save may replace.

    Raises:
        AlreadyExists, Replaced: another save has committed meanwhile. The files of this save have
            been removed.
    """
    old = commit.files_of(store)
    index = _index(metadata, results)
    if index is not None and is_whole(index) and name == commit.METADATA:
        with commit.undone_on_failure(store, lease.save_id):
            commit.publish(
                store,
                lease.save_id,
                index,
                manifest_header(ranks),
                admission=admission,
                confirm=lease.confirm,
            )
    else:
        data = pickled(metadata) if index is None else metadata_bytes(index)
        with commit.removed_if_refused(store, lease.save_id):
            lease.confirm()
            commit.put_record(store, data, admission, name=name)
    if index is not None or commit.files_of(store):
        remove_replaced(store, old - {name}, lease, stacklevel=4)


def commit_one_rank(
    store: Store,
    metadata: Any,
    results: Results,
    lease: Lease,
    *,
    rank: int,
    name: str,
    admission: commit.Admission,
) -> None:
    """Commit what one rank wrote (`use_collectives=False`), then remove what it replaces.

    Each rank commits alone, so there is no single moment at which all ranks' files are committed.
    Rank 0 removes a `.metadata` of an earlier save, which would take precedence over all of them.

    Args:
        store: where the rank's data files are durable already.
        metadata: with `storage_data`.
        results: those of this rank.
        rank: this rank.
        lease: of this save.
        name: the name of the rank's commit record.
        admission: the commit record that the save may replace.

    Raises:
        AlreadyExists, Replaced: another save has committed meanwhile. The files of this rank have
            been removed.
    """
    old = _files(store, name)
    index = _index(metadata, results)
    data = pickled(metadata) if index is None else metadata_bytes(index)
    with commit.removed_if_refused(store, lease.save_id, rank=rank):
        lease.confirm()
        commit.put_record(store, data, admission, name=name)
    for file in sorted(old - _files(store, name)):
        store.delete(file)
    if rank == 0:
        hidden = commit.files_of(store) if commit.exists(store, commit.METADATA) else frozenset()
        store.delete(commit.METADATA)
        for file in sorted(hidden):
            store.delete(file)


def _index(metadata: Any, results: Results) -> Index | None:
    """Return the metadata as an index, or None if an index would lose something."""
    try:
        index = index_of(metadata, results)
        return index if says_no_more(metadata, index) else None
    except (FormatError, AttributeError, TypeError):  # Raised by classes of the user's own.
        return None


def _files(store: Store, name: str) -> frozenset[str]:
    try:
        data = store.get_range(name, 0, store.head(name).size)
        return frozenset(read_metadata(data, file=name).files)
    except (FileNotFoundError, FormatError):
        return frozenset()
