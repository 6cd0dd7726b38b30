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
from typing_extensions import Unpack

from shardkeep.checkpoint import commit
from shardkeep.checkpoint.garbage import collect_garbage
from shardkeep.checkpoint.leases import Lease
from shardkeep.checkpoint.metrics import HEADER as METRICS
from shardkeep.coordination import detect_ranks
from shardkeep.coordination.contract import Ranks, Session
from shardkeep.coordination.progress import shown
from shardkeep.coordination.timing import Clock, slowest
from shardkeep.engine.negotiate import WriteAssignment, negotiate_writers, report
from shardkeep.engine.options import SaveConfig, SaveOptions
from shardkeep.engine.save_queue import Behind, line_of, simulated
from shardkeep.errors import LeaseLost, NotACheckpoint
from shardkeep.format.messages import columns
from shardkeep.format.torch_zip.container_write import TensorFraming
from shardkeep.io.arena import Arena, allocate_huge_pages
from shardkeep.io.checksums import crc32
from shardkeep.io.contract import Payloads
from shardkeep.io.write.files import choose_writers, copy_threads, open_targets, write_windows
from shardkeep.io.write.staging import StagingLayout, stage_payloads
from shardkeep.io.write.windows import BlockChecksums, FileWindows, checksum_memory, lay_out_files
from shardkeep.io.write.written import collect_written
from shardkeep.plan.distinct import distinct
from shardkeep.plan.memory_budget import MemoryBudget
from shardkeep.stores import LocalStore, open_store
from shardkeep.stores.contract import Store
from shardkeep.torch_state.describe import LocalState, describe_state
from shardkeep.torch_state.devices import pinned
from shardkeep.torch_state.objects import to_bytes
from shardkeep.torch_state.payloads import StatePayloads
from shardkeep.types import DTYPES, ITEMSIZES, Index, never_yield
from shardkeep.util import gc_pause
from shardkeep.util.formatting import human_bytes
from shardkeep.util.retry import tried
from shardkeep.version import __version__

__all__ = ["SaveReport", "header", "life", "remove_replaced", "save"]

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


def save(
    state: Mapping[Any, Any],
    path: str | PathLike[str] | Store,
    *,
    overwrite: bool = False,
    save_id: str | None = None,
    ranks: Sequence[int] | Ranks | None = None,
    **options: Unpack[SaveOptions],
) -> SaveReport:
    """Save a state as one checkpoint; every participating rank calls this with its own state.

    The checkpoint appears in one atomic step, when all its bytes are durable. A save that fails
    leaves nothing behind, and leaves a checkpoint that it should have replaced as it was.

    The state must not change until this returns, because large tensors are written directly from
    their memory. If another thread changes one meanwhile, loading it raises `Damaged`. To go on
    with training while the state is written, use `async_save`, which copies it first.

    Args:
        state: nested mappings and lists of tensors and values. An object at the top level that has
            `state_dict` and `load_state_dict` is saved as what its `state_dict` returns.
        path: a folder, which is created if it is missing, or a store.
        overwrite: replace the checkpoint at `path`, which can be loaded until the new one is
            durable.
        save_id: the id of the save, 32 lowercase hexadecimal digits that no other save has used.
            It is taken from the coordinator, and generated by default.
        ranks: the global ranks that participate. The default is all ranks of the default process
            group, or this process alone.
        flatten: True (the default) stores nested containers leaf by leaf. False stores each
            top-level value as one object, with its tensors inside (`flatten_state_dict=False` in
            DCP).
        files: the number of data files that each rank writes at most. Their sizes are as even as
            whole items allow; a tensor larger than `SHARDKEEP_MAX_CHUNK_BYTES` is several items. By
            default a rank writes one file, or none if it has nothing to write.
        balance_replicas: True (the default) distributes replicated tensors over the ranks that hold
            them. With False the lowest of these ranks writes them.
        require_identical_objects: True (the default) refuses an object whose value differs between
            ranks. With False the value of the lowest rank is saved, with a warning. Only values
            that are stored in the manifest are compared.
        max_host_memory: the number of bytes of host memory that the save may use, besides what
            pickled objects take. The default is `SHARDKEEP_MAX_HOST_MEMORY_BYTES`.
        retries: how many times a rank writes its files again if storage refuses them (`OSError`).
            The other ranks wait for it. The default is 0.
        progress: a callback for progress, or True for a progress bar on standard error if that is a
            terminal.

    Returns:
        What was saved, and how long each phase took.

    Raises:
        AlreadyExists: there is a checkpoint at `path`, and `overwrite` is False.
        Conflict: the ranks' states contradict each other: two values under one name, or chunks of a
            tensor that overlap or leave a gap. Nothing was written.
        TypeError, ValueError: an argument is not valid. Nothing was written.
        AsyncSaveFailed: an earlier asynchronous save failed, and its result was never requested.
            This save was not started.
        RankFailed: another rank failed. Nothing was committed.

    Example:
        >>> report = shardkeep.save({"model": model, "step": 100}, "run/step_100")
        >>> print(report)
        saved 1.9 GiB in 0.93 s, this rank 1.9 GiB (2.2 GB/s): plan 0.02, write 0.88, ...
    """
    config = SaveConfig.of("save", SaveOptions, options, overwrite=overwrite, save_id=save_id)
    line = line_of(simulated(ranks))
    line.finish()  # One of them may be on its way to the same place.
    return life([line.owed(state)], open_store(path), detect_ranks(ranks), config)


def life(
    given: list[Mapping[Any, Any]],
    store: Store,
    job: Ranks,
    config: SaveConfig,
    behind: Behind | None = None,
) -> SaveReport:
    """The life itself.

    Args:
        given: the state. It is taken out, or its tensors would live until all files are written.
        store, job, config: where to, who takes part, how.
        behind: for a save in the background; None writes the state from where it is.

    Raises: as `save`.
    """
    with (
        job.session("save", store.url) as session,
        Lease(store, config.save_id or commit.new_id()) as lease,
        _closing(store),
    ):
        clock = Clock(session, _PARTS)
        old: list[commit.Admission] = []
        # The collector is one for all threads, as the interpreter is: a training loop needs them.
        quiet = gc_pause.paused if behind is None else contextlib.nullcontext
        yield_gil = never_yield if behind is None else behind.yield_gil
        with gc_pause.paused():
            clock.phase("describe")
            local = describe_state(
                given.pop(), nested=config.flatten, rank=(session.rank, session.size)
            )

            clock.phase("own")
            order = negotiate_writers(
                session,
                local.claim,
                lambda: old.append(commit.admit(store, overwrite=config.overwrite)),
                begin=lease.take,
                save_id=lease.save_id,
                balance_replicas=config.balance_replicas,
                require_identical_objects=config.require_identical_objects,
            )
            if order.write_plan is not None and order.write_plan.differing:
                _warn_of(order.write_plan.differing)

            clock.phase("write" if behind is None else "stage")
            payloads = _Payloads(local, order, lasting=behind is None)
            del local
        here = session.ranks_on_this_host()
        staged = None if behind is None else behind.staged
        if behind is not None and payloads.stage(behind.arena, config.max_host_memory, here):
            _set(staged)
            staged = None

        clock.phase("write")
        with commit.removed_on_failure(store, order.save_id, session.rank):
            if config.low_priority and behind is not None:
                _give_way()
            name = partial(commit.data_file, session.rank, save_id=order.save_id)
            images = _write(store, payloads, name, session, clock, config, partial(_set, staged))

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
                about = header(session.size, config.metrics)
                with quiet():
                    commit.publish(
                        store,
                        lease.save_id,
                        index,
                        about,
                        yield_gil,
                        admission=old[0],
                        confirm=lease.confirm,
                    )
        totals, _ = columns.unpack(session.broadcast(_totals(index) if index else None))
        if session.rank == 0:
            yield_gil()
            remove_replaced(store, old[0].files, lease)
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
    config: SaveConfig,
    made: Callable[[], None],
) -> list[FileWindows]:
    """Write this rank's files, durably: again under other names, if storage refuses what is staged.

    The other ranks wait, and need not know.
    """
    left = MemoryBudget.of(config.max_host_memory).after_staging(payloads.staged or 0)
    beside = payloads.staged is not None
    threads, window = choose_writers(session.ranks_on_this_host(), left, asynchronous=beside)
    images: list[FileWindows] = []

    def once(before: int) -> None:
        clock.phase("write")
        count = payloads.files(config.files)
        names = [name(number) for number in range(before * count, (before + 1) * count)]
        images[:] = payloads.images(names, window)
        telling = shown(config.progress, session)
        with open_targets(store, images) as targets, telling as tell:
            write_windows(targets, images, threads=threads, progress=tell, on_made=made)
            clock.phase("sync")
        store.sync()

    tried(once, config.retries if payloads.lasting else 0)
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

    def __init__(self, local: LocalState, order: WriteAssignment, *, lasting: bool) -> None:
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
        self.lasting = lasting
        self.staged: int | None = None
        """Bytes of memory that they are staged in; None until they are."""

    def stage(self, arena: Arena, budget: int | None, ranks_here: int) -> bool:
        """Copy all to memory where it lasts; False if that would take more than the budget."""
        places = StagingLayout(self._bytes, self._nbytes)
        if not MemoryBudget.of(budget).can_stage(places.nbytes):
            return False
        memory = arena.take(places.nbytes, pinned if self._on_cuda else allocate_huge_pages)
        staged = stage_payloads(self._bytes, places, memory, threads=copy_threads(ranks_here))
        self._bytes, self._checksums = staged, staged.checksums
        self.lasting, self.staged = True, places.nbytes
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
                in_place=self.lasting,
                checksums=self._checksums,
            )


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
