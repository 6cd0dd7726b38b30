"""The life of a save, from top to bottom."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch

from shardkeep import settings
from shardkeep.checkpoint import commit
from shardkeep.checkpoint.garbage import collect_garbage
from shardkeep.checkpoint.leases import Lease
from shardkeep.checkpoint.metrics import HEADER as METRICS
from shardkeep.coordination import detect_ranks
from shardkeep.coordination.contract import Ranks, Session
from shardkeep.coordination.progress import shown
from shardkeep.coordination.timing import Clock, slowest
from shardkeep.engine.negotiate import WriteAssignment, negotiate_writers, report
from shardkeep.engine.save_queue import Behind, line_of, simulated
from shardkeep.errors import AlreadyExists, LeaseLost, NotACheckpoint, ShardkeepError
from shardkeep.format.messages import columns
from shardkeep.format.torch_zip.container_write import TensorFraming
from shardkeep.io.arena import Arena, roomy
from shardkeep.io.checksums import crc32
from shardkeep.io.contract import Payloads
from shardkeep.io.write.files import choose_writers, copy_threads, open_targets, write_windows
from shardkeep.io.write.staging import StagingLayout, stage_payloads
from shardkeep.io.write.windows import BlockChecksums, FileWindows, checksum_memory, lay_out_files
from shardkeep.io.write.written import collect_written
from shardkeep.plan.distinct import distinct
from shardkeep.plan.file_layout import MIN_WINDOW_BYTES
from shardkeep.stores import LocalStore, store_at
from shardkeep.stores.contract import Store
from shardkeep.torch_state.describe import Local, describe_state
from shardkeep.torch_state.devices import pinned
from shardkeep.torch_state.objects import to_bytes
from shardkeep.torch_state.payloads import StatePayloads
from shardkeep.types import DTYPES, ITEMSIZES, Index, Progress, never_yield
from shardkeep.util import gc_pause
from shardkeep.util.formatting import human_bytes
from shardkeep.util.retry import tried
from shardkeep.version import __version__

__all__ = ["Options", "SaveReport", "header", "life", "remove_replaced", "save"]

_SHOWN = 8
"""Ranks that a message names."""

_PARTS = {"describe": "plan", "own": "plan", "report": "commit"}
"""What a report calls the phases that errors name in more detail."""


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save did.

    Attributes:
        path: where the checkpoint is.
        save_id: its id, in the names of its files.
        tensors, objects: how many names it holds.
        nbytes: bytes of all data files, written by all ranks.
        written: bytes that this rank wrote.
        seconds: phase -> seconds that this rank spent in it: "plan" (who writes what), "stage"
            (copy it, async only), "write", "sync" (until it is durable), "commit".
        slowest: the rank that took longest until its files were durable, and its seconds.
    """

    path: str
    save_id: str
    tensors: int
    objects: int
    nbytes: int
    written: int
    seconds: Mapping[str, float]
    slowest: tuple[int, float]

    @property
    def rate(self) -> float:
        """GB/s (10^9 bytes) of this rank's writing, until it was durable."""
        spent = self.seconds.get("write", 0.0) + self.seconds.get("sync", 0.0)
        return self.written / spent / 1e9 if spent else 0.0

    def __str__(self) -> str:
        return (
            f"saved {human_bytes(self.nbytes)} in {sum(self.seconds.values()):.2f} s, this rank "
            f"{human_bytes(self.written)} ({self.rate:.1f} GB/s): "
            + ", ".join(f"{phase} {spent:.2f}" for phase, spent in self.seconds.items())
            + f"; slowest rank {self.slowest[0]}, {self.slowest[1]:.2f} s"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Options:
    """How to save; see `save`.

    Raises:
        ValueError: no number of files, or of bytes.
    """

    overwrite: bool = False
    flatten: bool = True
    files: int | None = None
    balance_replicas: bool = True
    require_identical_objects: bool = True
    save_id: str | None = None
    max_host_memory: int | None = None
    progress: Progress | bool | None = None
    low_priority: bool = False
    metrics: Mapping[str, float] | None = None
    retries: int = 0

    def __post_init__(self) -> None:
        settings.check_max_host_memory(self.max_host_memory)
        if self.files is not None and self.files < 1:
            raise ValueError(f"files={self.files} can't be: 1 or more")


def save(
    state: Mapping[Any, Any],
    path: str | PathLike[str] | Store,
    *,
    overwrite: bool = False,
    flatten: bool = True,
    files: int | None = None,
    balance_replicas: bool = True,
    require_identical_objects: bool = True,
    save_id: str | None = None,
    max_host_memory: int | None = None,
    ranks: Sequence[int] | Ranks | None = None,
    progress: Progress | bool | None = None,
) -> SaveReport:
    """Save a state as one checkpoint; every rank that takes part calls this with its own state.

    The checkpoint is whole or absent: it appears in one step, when everything is durable.

    The state must not change until this returns: large tensors are written from where they are, and
    one that another thread changes meanwhile is `Damaged` to who loads it. `async_save` copies.

    Args:
        state: nested mappings and lists of tensors and values. At the top level, whatever has
            `state_dict` and `load_state_dict` stands for its state.
        path: a folder (made if needed), or a store.
        overwrite: replace the checkpoint at `path`; it loads until the new one is durable.
        flatten: False keeps each top-level value as one leaf: containers become objects, with
            their tensors inside (what DCP calls `flatten_state_dict=False`).
        files: data files of each rank at most, as even in bytes as whole items can make them; what
            is larger than `SHARDKEEP_MAX_CHUNK_BYTES` is several items. By default one, and none
            for a rank that writes nothing.
        balance_replicas: share replicas out over the ranks that hold them; else the lowest one
            writes them.
        require_identical_objects: refuse objects that differ between ranks under one name; else
            the lowest
            rank's is saved, with a warning. Values that stand in the manifest are compared.
        save_id: an id for the save that was never used before, of 32 hexadecimal digits, taken
            from the coordinator; by default a new one.
        max_host_memory: bytes of memory that the writing may take, besides what objects take when
            they are pickled; by default `SHARDKEEP_MAX_HOST_MEMORY_BYTES`.
        ranks: global ranks that take part (default: all of the default group, or this process).
        progress: told how far the writing has come; True shows a bar on standard error, if that
            is a terminal.

    Raises:
        AlreadyExists: there is a checkpoint, and `overwrite` is False.
        Conflict: two things under one name, overlapping or missing boxes; nothing was written.
        TypeError, ValueError: an argument that can't be; nothing was made.
        AsyncSaveFailed: an asynchronous save failed before, and nobody asked for its result; this
            one was not begun.
        RankFailed: another rank failed; nothing was committed.
    """
    options = Options(
        overwrite,
        flatten,
        files,
        balance_replicas,
        require_identical_objects,
        save_id,
        max_host_memory,
        progress,
    )
    line = line_of(simulated(ranks))
    line.finish()  # One of them may be on its way to the same place.
    return life([line.owed(state)], store_at(path), detect_ranks(ranks), options)


def life(
    given: list[Mapping[Any, Any]],
    store: Store,
    job: Ranks,
    options: Options,
    behind: Behind | None = None,
) -> SaveReport:
    """The life itself.

    Args:
        given: the state. It is taken out, or its tensors would live until all files are written.
        store, job, options: where to, who takes part, how.
        behind: for a save in the background; None writes the state from where it is.

    Raises: as `save`.
    """
    with (
        job.session("save", store.url) as session,
        Lease(store, options.save_id or commit.new_id()) as lease,
        _closing(store),
    ):
        clock = Clock(session, _PARTS)
        old: list[frozenset[str]] = []
        # The collector is one for all threads, as the interpreter is: a training loop needs them.
        quiet = gc_pause.paused if behind is None else contextlib.nullcontext
        yield_gil = never_yield if behind is None else behind.yield_gil
        with gc_pause.paused():
            clock.phase("describe")
            local = describe_state(
                given.pop(), nested=options.flatten, rank=(session.rank, session.size)
            )

            clock.phase("own")
            order = negotiate_writers(
                session,
                local.claim,
                lambda: old.append(_admit(store, options.overwrite)),
                begin=lease.take,
                save_id=lease.save_id,
                balance_replicas=options.balance_replicas,
                require_identical_objects=options.require_identical_objects,
            )
            if order.write_plan is not None and order.write_plan.differing:
                _warn_of(order.write_plan.differing)

            clock.phase("write" if behind is None else "stage")
            payloads = _Payloads(local, order, lasting=behind is None)
            del local
        here = settings.ranks_here(session.size)
        staged = None if behind is None else behind.staged
        if behind is not None and payloads.stage(behind.arena, options.max_host_memory, here):
            _set(staged)
            staged = None

        clock.phase("write")
        with commit.removed_on_failure(store, order.save_id, session.rank):
            if options.low_priority:
                _give_way()
            name = partial(commit.data_file, session.rank, save_id=order.save_id)
            images = _write(store, payloads, name, session, clock, options, partial(_set, staged))

            clock.phase("report")
            yield_gil()
            last = slowest(session, sum(clock.seconds().values()))
            with quiet():
                written = collect_written(images)
            yield_gil()

        with commit.undone_on_failure(store, order.save_id, leads=session.rank == 0):
            with quiet():
                index = report(session, order, written)
            if index is not None:
                _check_there(store, index, session)

            clock.phase("commit")
            if index is not None:
                lease.confirm()
                about = header(session.size, options.metrics)
                with quiet():
                    commit.publish(store, lease.save_id, index, about, yield_gil)
        totals, _ = columns.unpack(session.broadcast(_totals(index) if index else None))
        if session.rank == 0:
            yield_gil()
            remove_replaced(store, old[0], lease)
        return SaveReport(
            path=store.url,
            save_id=order.save_id,
            written=sum(image.layout.nbytes for image in images),
            seconds=clock.seconds(),
            slowest=last,
            **totals,
        )


def _write(
    store: Store,
    payloads: _Payloads,
    name: Callable[[int], str],
    session: Session,
    clock: Clock,
    options: Options,
    made: Callable[[], None],
) -> list[FileWindows]:
    """Write this rank's files, durably: again under other names, if storage refuses what is staged.

    The other ranks wait, and need not know.
    """
    budget = options.max_host_memory
    left = settings.max_host_memory_bytes() if budget is None else budget - (payloads.staged or 0)
    beside = payloads.staged is not None
    threads, window = choose_writers(settings.ranks_here(session.size), left, beside=beside)
    images: list[FileWindows] = []

    def once(before: int) -> None:
        clock.phase("write")
        count = payloads.files(options.files)
        names = [name(number) for number in range(before * count, (before + 1) * count)]
        images[:] = payloads.images(names, window)
        telling = shown(options.progress, session)
        with open_targets(store, images) as targets, telling as tell:
            write_windows(targets, images, threads=threads, progress=tell, made=made)
            clock.phase("sync")
        store.sync()

    tried(once, 0 if payloads.staged is None else options.retries)
    return images


@contextlib.contextmanager
def _closing(store: Store) -> Iterator[None]:
    """An error that somebody keeps holds what it met; no file shall be open for that."""
    try:
        yield
    finally:
        if isinstance(store, LocalStore):
            store.close()


def _give_way() -> None:
    """Give this thread, and those that it starts, the lowest priority, where threads have one.

    Elsewhere than on Linux, a thread's number may be that of some other process.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _set(future: Future[None] | None) -> None:
    """Tell the caller that the state is not looked at any more.

    Raises:
        KeyboardInterrupt: the caller has stopped waiting for that, and may have changed the state.
    """
    if future is None:
        return
    if not future.set_running_or_notify_cancel():
        raise KeyboardInterrupt("the save was interrupted while its state was copied")
    future.set_result(None)


class _Payloads:
    """What this rank has to write: its pieces, then its objects.

    Args:
        local, order: what there is, and what of it is this rank's.
        lasting: nothing changes until all is written; else only until all has been copied.
    """

    def __init__(self, local: Local, order: WriteAssignment, *, lasting: bool) -> None:
        claim, rows = local.claim, order.pieces
        objects = [to_bytes(local.objects[name], name=name) for name in order.objects]
        of, sizes = claim.piece[rows], claim.sizes[rows]
        codes, ndim = claim.tensors.dtype[of], claim.tensors.ndim[of]
        kind, first = distinct([codes, ndim, *sizes.T])
        self._framings = [
            TensorFraming(DTYPES[codes[row]], tuple(sizes[row, : ndim[row]].tolist()))
            for row in first.tolist()
        ] + [None]  # of objects
        self._kind = np.concatenate([kind, np.full(len(objects), len(first), dtype=np.int64)])
        self._nbytes = np.concatenate(
            [
                sizes.prod(axis=1) * ITEMSIZES[codes],
                np.array([len(data) for data in objects], dtype=np.int64),
            ]
        )
        self._crcs = {row: crc32(data) for row, data in enumerate(objects, len(rows))}
        memory = [local.memory[row] for row in rows.tolist()]
        source = StatePayloads(memory, local.addresses[rows], objects)
        self._on_cuda = any(device.type == "cuda" for device in source.devices)
        self._bytes: Payloads = source
        self._checksums: BlockChecksums = checksum_memory
        self._lasting = lasting
        self.staged: int | None = None
        """Bytes of memory that they are staged in; None until they are."""

    def stage(self, arena: Arena, budget: int | None, ranks_here: int) -> bool:
        """Copy all to memory where it lasts; False if that would take more than the budget."""
        places = StagingLayout(self._bytes, self._nbytes)
        if budget is not None and places.nbytes + MIN_WINDOW_BYTES > budget:
            return False
        memory = arena.take(places.nbytes, pinned if self._on_cuda else roomy)
        staged = stage_payloads(self._bytes, places, memory, threads=copy_threads(ranks_here))
        self._bytes, self._checksums = staged, staged.checksums
        self._lasting, self.staged = True, places.nbytes
        return True

    def files(self, wanted: int | None) -> int:
        """How many files; by default one, if there is anything to write."""
        return min(1, len(self._kind)) if wanted is None else wanted

    def images(self, names: Sequence[str], window: int) -> list[FileWindows]:
        """Of these files, in windows of so many bytes at most."""
        with gc_pause.paused() if self.staged is None else contextlib.nullcontext():
            return lay_out_files(
                names,
                self._nbytes,
                self._kind,
                self._framings,
                self._bytes,
                self._crcs,
                window,
                in_place=self._lasting,
                checksums=self._checksums,
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


def _check_there(store: Store, index: Index, session: Session) -> None:
    """Refuse what could never be read: a folder that has gone, or one on a disk of each rank's."""
    gone = [file for file in index.files if not commit.exists(store, file)]
    if not gone:
        return
    away = sorted(set(map(commit.rank_of, gone)) - {session.rank})
    if not away:
        raise NotACheckpoint(
            f"{store.url}: {gone[0]} was written, but has gone: was the folder removed or replaced "
            "meanwhile? nothing was committed"
        )
    hosts = [f"rank {rank} on {session.host(rank)}" for rank in away[:_SHOWN]]
    hosts += [f"{len(away) - _SHOWN} more ranks"] if len(away) > _SHOWN else []
    raise NotACheckpoint(
        f"{store.url}: what {', '.join(hosts)} wrote there is not there for rank {session.rank} on "
        f"{session.host(session.rank)}: ranks must save to one place that all of them see; "
        "nothing was committed"
    )


def _warn_of(differing: Sequence[str]) -> None:
    more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
    warnings.warn(
        f"ranks have different values of {', '.join(map(repr, differing[:8]))}{more}: the lowest "
        "rank's is saved; give each rank's its own name",
        stacklevel=4,
    )


def remove_replaced(store: Store, old: frozenset[str], lease: Lease) -> None:
    """Remove the files of the overwritten checkpoint, and what dead saves left.

    The new checkpoint is committed, come what may.
    """
    try:
        commit.remove_replaced(store, old)
        collect_garbage(store, lease)
    except (OSError, LeaseLost) as error:
        what = "files of the overwritten checkpoint, or of dead saves, stay behind"
        warnings.warn(f"{what}: {error}", stacklevel=4)


def header(ranks: int, metrics: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What a manifest says of the save that so many ranks made."""
    return {
        **({METRICS: dict(metrics)} if metrics else {}),
        "shardkeep": __version__,
        "torch": str(torch.__version__),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ranks": ranks,
    }


def _totals(index: Index) -> bytes:
    legacy_duplicates = len(index.legacy_duplicates)
    chunks = index.chunks
    _, items = distinct([chunks.file, chunks.item, chunks.length])
    nbytes = int(chunks.length[items].sum()) + int(index.objects.length.sum())
    return columns.pack(
        {
            "tensors": len(index.tensors.names),
            "objects": len(index.objects.names) - legacy_duplicates,
            "nbytes": nbytes,
        },
        {},
    )
