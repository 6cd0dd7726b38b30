"""The life of a save, from top to bottom."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch

import shardkeep
from shardkeep import commit, knobs
from shardkeep.agreement import Order, own, report
from shardkeep.clock import Clock
from shardkeep.contracts import Progress, Ranks, Store
from shardkeep.errors import AlreadyExists, NotACheckpoint, ShardkeepError
from shardkeep.format import columns
from shardkeep.format.container_write import TensorItem
from shardkeep.io.write import Bare, Item, Written, write_packed
from shardkeep.ranks import take_part
from shardkeep.stores import store_at
from shardkeep.tensors.memory import payload
from shardkeep.tensors.objects import to_bytes
from shardkeep.tensors.state import Local, describe_state
from shardkeep.types import Index

__all__ = ["SaveReport", "save"]


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save did.

    Attributes:
        path: where the checkpoint is.
        save_id: its id, in the names of its files.
        tensors, objects: how many names it holds.
        nbytes: bytes of all data files, written by all ranks.
        written: bytes that this rank wrote.
        seconds: phase -> seconds that this rank spent in it.
    """

    path: str
    save_id: str
    tensors: int
    objects: int
    nbytes: int
    written: int
    seconds: Mapping[str, float]


def save(
    state: Mapping[Any, Any],
    path: str | PathLike[str] | Store,
    *,
    overwrite: bool = False,
    flatten: bool = True,
    files: int | None = None,
    spread: bool = True,
    same_objects: bool = True,
    save_id: str | None = None,
    ranks: Sequence[int] | Ranks | None = None,
    progress: Progress | None = None,
) -> SaveReport:
    """Save a state as one checkpoint; every rank that takes part calls this with its own state.

    The checkpoint is whole or absent: it appears in one step, when everything is durable.

    Args:
        state: nested mappings and lists of tensors and values. At the top level, whatever has
            `state_dict` and `load_state_dict` stands for its state.
        path: a folder (made if needed), or a store.
        overwrite: replace the checkpoint at `path`; it loads until the new one is durable.
        flatten: False keeps each top-level value as one leaf: containers become objects, with
            their tensors inside (what DCP calls `flatten_state_dict=False`).
        files: data files of each rank, even in bytes. By default one, and none for a rank that
            writes nothing.
        spread: share replicas out over the ranks that hold them; else the lowest one writes them.
        same_objects: refuse objects that differ between ranks under one name; else the lowest
            rank's is saved, with a warning. Values that stand in the manifest are compared.
        save_id: an id for the save that was never used before, of 32 hexadecimal digits, taken
            from the coordinator; by default a new one.
        ranks: global ranks that take part (default: all of the default group, or this process).
        progress: told how far the writing has come.

    Raises:
        AlreadyExists: there is a checkpoint, and `overwrite` is False.
        Conflict: two things under one name, overlapping or missing boxes; nothing was written.
        RankFailed: another rank failed; nothing was committed.
    """
    job = take_part(ranks)
    store = store_at(path)
    with job.session("save", store.url) as session:
        clock = Clock(session)
        clock.phase("describe")
        local = describe_state(state, nested=flatten)

        clock.phase("own")
        old: list[frozenset[str]] = []
        order = own(
            session,
            local.claim,
            lambda: old.append(_admit(store, overwrite)),
            save_id=save_id,
            spread=spread,
            same_objects=same_objects,
        )
        if order.settlement is not None and order.settlement.differing:
            _warn_of(order.settlement.differing)

        clock.phase("write")
        with _removed_on_failure(store, order.save_id, session.rank):
            written = _write(store, session.rank, files, local, order, progress)
            store.sync()

            clock.phase("report")
            index = report(session, order, written)
            if index is not None and session.size > 1:
                _check_there(store, index)

        clock.phase("commit")
        if index is not None:
            commit.publish(store, order.save_id, index, header(session.size))
        totals, _ = columns.unpack(session.broadcast(_totals(index) if index else None))
        if session.rank == 0:
            sweep(store, old[0])
        return SaveReport(
            path=store.url,
            save_id=order.save_id,
            written=int(written.length.sum()),
            seconds=clock.seconds(),
            **totals,
        )


def _admit(store: Store, overwrite: bool) -> frozenset[str]:
    """The files that an overwritten checkpoint is made of. Raises AlreadyExists."""
    try:
        commit.find(store)
    except NotACheckpoint:
        return frozenset()
    except ShardkeepError as error:
        if not overwrite:
            raise AlreadyExists(
                f"{store.url} holds a checkpoint that can't be read: {error}"
            ) from None
    if not overwrite:
        raise AlreadyExists(
            f"{store.url} already holds a checkpoint; pass overwrite=True to replace it"
        )
    return commit.files_of(store)


def _write(
    store: Store,
    rank: int,
    files: int | None,
    local: Local,
    order: Order,
    progress: Progress | None,
) -> Written:
    """Write this rank's pieces, then its objects, to its data files."""
    items = [
        Item(TensorItem(piece.dtype, piece.box.sizes), partial(payload, piece.local))
        for piece in (local.pieces[row] for row in order.pieces.tolist())
    ]
    for name in order.objects:
        data = to_bytes(local.objects[name], name=name)
        items.append(Item(Bare(len(data)), memoryview(data)))
    count = min(1, len(items)) if files is None else files
    names = [commit.data_file(rank, number, order.save_id) for number in range(count)]
    return write_packed(store, names, items, threads=knobs.threads(), progress=progress)


@contextlib.contextmanager
def _removed_on_failure(store: Store, save_id: str, rank: int) -> Iterator[None]:
    """What can't be committed any more does not stay, or a full disk would stay full.

    The coordinator removes all ranks' files: some ranks may be dead, and those that wait for the
    commit can't know whether it came about, so later failures remove nothing.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            commit.remove_files(store, save_id, rank or None)
        raise


def _check_there(store: Store, index: Index) -> None:
    """Refuse what could never be read: ranks may have disks of their own under one path."""
    for file in index.files:
        try:
            store.size(file)
        except FileNotFoundError:
            raise NotACheckpoint(
                f"{store.url}: {file} was written by another rank, but is not there: do all ranks "
                "save to the same place? nothing was committed"
            ) from None


def _warn_of(differing: Sequence[str]) -> None:
    more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
    warnings.warn(
        f"ranks have different values of {', '.join(map(repr, differing[:8]))}{more}: the lowest "
        "rank's is saved; give each rank's its own name",
        stacklevel=4,
    )


def sweep(store: Store, old: frozenset[str]) -> None:
    """Remove the files of the overwritten checkpoint; the new one is committed, come what may."""
    try:
        commit.sweep(store, old)
    except OSError as error:
        warnings.warn(f"files of the overwritten checkpoint stay behind: {error}", stacklevel=3)


def header(ranks: int) -> dict[str, Any]:
    """What a manifest says of the save that so many ranks made."""
    return {
        "shardkeep": shardkeep.__version__,
        "torch": str(torch.__version__),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ranks": ranks,
    }


def _totals(index: Index) -> bytes:
    twins = len(index.twins)
    chunks = index.chunks
    items = np.unique(np.column_stack([chunks.file, chunks.item, chunks.length]), axis=0)
    nbytes = int(items[:, 2].sum()) + int(index.objects.length.sum())
    return columns.pack(
        {
            "tensors": len(index.tensors.names),
            "objects": len(index.objects.names) - twins,
            "nbytes": nbytes,
        },
        {},
    )
