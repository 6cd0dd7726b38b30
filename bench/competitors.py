"""The contestants: each tool behind the same few methods, at its best settings.

`save` returns once the checkpoint is durable: its files and its folder are synced. `load` fills an
existing state. `begin` starts a save in the background and returns once the caller may change its
tensors again; the value that it returns says whether the checkpoint is durable, or waits until it
is. `columns` reads some columns of one tensor. A contestant that cannot do one of these lacks the
method.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from bench import limits
from bench.limits import sync_folder
from bench.states import ONE, State, locals_of

__all__ = ["MAKERS", "Contestant", "Pending", "make"]

Array = NDArray[Any]
Figures = Mapping[str, float] | None


class Pending(Protocol):
    """A save in the background. Asking for its result waits until it has ended."""

    def done(self) -> bool: ...

    def result(self) -> Any: ...


class Contestant(Protocol):
    """One tool. Every contestant has `close`, and some of the other methods."""

    def save(self, state: State, path: Path) -> Figures: ...

    def load(self, state: State, path: Path) -> Figures: ...

    def begin(self, state: State, path: Path) -> Pending: ...

    def columns(self, tensor: torch.Tensor, first: int, last: int, path: Path) -> Array:
        """Return columns `first` to `last` of the tensor `ONE`; `tensor` is one of its shape."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class SyncedPending:
    """A `Pending` of a tool that does not sync: `sync` is called after the tool has finished."""

    done: Callable[[], bool]
    wait: Callable[[], Any]
    sync: Callable[[], None]

    def result(self) -> None:
        self.wait()
        self.sync()


class Shardkeep:
    """Shardkeep. A version that lacks a method or an option fails with its own error."""

    def __init__(
        self,
        rank: int,
        ranks: int,
        *,
        verify: bool = True,
        low_priority: bool = False,
    ) -> None:
        import shardkeep

        self.engine, self.verify = shardkeep, verify
        self.options = {"low_priority": True} if low_priority else {}

    def save(self, state: State, path: Path) -> None:
        self.engine.save(state, path, overwrite=True)

    def load(self, state: State, path: Path) -> Figures:
        report = self.engine.load(state, path, verify=self.verify)
        return {"bytes_read": report.read, "bytes_needed": report.nbytes}

    def begin(self, state: State, path: Path) -> Pending:
        handle: Pending = self.engine.async_save(state, path, overwrite=True, **self.options)
        return handle

    def columns(self, tensor: torch.Tensor, first: int, last: int, path: Path) -> Array:
        box = self.engine.Box((0, first), (tensor.shape[0], last - first))
        return self.engine.open(path).read(ONE, box=box, verify=self.verify)

    def close(self) -> None:
        release = getattr(self.engine, "release_memory", None)
        if release is not None:
            release()


class Stock:
    """torch.distributed.checkpoint.

    Args:
        threads: the number of threads of its writer.
        caching: whether it reuses the plans of earlier saves.
        stager: "own" for the stager of the writer, which copies into fresh memory; "kept" for one
            that reuses its memory.
        process: whether a process writes in the background instead of a thread.
        copying: the number of threads with which torch copies in a load.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        *,
        threads: int = 1,
        caching: bool = False,
        stager: str = "own",
        process: bool = False,
        copying: int | None = None,
    ) -> None:
        import torch.distributed.checkpoint as dcp

        self.dcp, self.alone = dcp, not torch.distributed.is_initialized()
        self.threads, self.caching = threads, caching
        self.copying = copying or torch.get_num_threads()
        self.process, self.stager = process, self._stager(process) if stager == "kept" else None

    def _stager(self, shared: bool) -> Any:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        return DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=shared,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )

    def _how(self, path: Path) -> dict[str, Any]:
        writer = self.dcp.FileSystemWriter(path, thread_count=self.threads, sync_files=True)
        planner = self.dcp.DefaultSavePlanner(enable_plan_caching=self.caching)
        return {"storage_writer": writer, "planner": planner, "no_dist": self.alone}

    def save(self, state: State, path: Path) -> None:
        self.dcp.save(state, **self._how(path))

    def load(self, state: State, path: Path) -> None:
        reader = self.dcp.FileSystemReader(path)
        with copies_by(self.copying):
            self.dcp.load(state, storage_reader=reader, no_dist=self.alone)

    def begin(self, state: State, path: Path) -> Pending:
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        kind = AsyncCheckpointerType.PROCESS if self.process else AsyncCheckpointerType.THREAD
        kept = {"async_stager": self.stager} if self.stager else {}
        future: Pending = self.dcp.async_save(
            state, async_checkpointer_type=kind, **kept, **self._how(path)
        )
        return future

    def columns(self, tensor: torch.Tensor, first: int, last: int, path: Path) -> Array:
        whole = {ONE: torch.empty_like(tensor)}
        self.load(whole, path)
        return whole[ONE][:, first:last].numpy()

    def close(self) -> None:
        if self.stager:
            self.stager.close()


class Torch:
    """torch.save of the tensors of each rank, one file per rank; mapped and copied on loading."""

    def __init__(self, rank: int, ranks: int, *, copying: int = 1) -> None:
        self.copying = copying
        self.name = f"{rank}.pt"

    def save(self, state: State, path: Path) -> None:
        path.mkdir(exist_ok=True)
        with (path / self.name).open("wb") as file:
            torch.save(locals_of(state), file)
        sync(path / self.name)

    def load(self, state: State, path: Path) -> None:
        stored = torch.load(path / self.name, mmap=True, weights_only=True)
        with copies_by(self.copying):
            for name, tensor in locals_of(state).items():
                tensor.copy_(stored[name])

    def columns(self, tensor: torch.Tensor, first: int, last: int, path: Path) -> Array:
        stored = torch.load(path / self.name, mmap=True, weights_only=True)
        return stored[ONE][:, first:last].contiguous().numpy()

    def close(self) -> None:
        pass


class Safetensors:
    """safetensors with one file per rank; mapped and copied on loading."""

    def __init__(self, rank: int, ranks: int, *, copying: int = 1) -> None:
        import safetensors.torch

        self.copying = copying
        self.library, self.name = safetensors, f"{rank}.safetensors"

    def save(self, state: State, path: Path) -> None:
        path.mkdir(exist_ok=True)
        self.library.torch.save_file(locals_of(state), path / self.name)
        sync(path / self.name)

    def load(self, state: State, path: Path) -> None:
        with (
            self.library.safe_open(path / self.name, framework="pt") as stored,
            copies_by(self.copying),
        ):
            for name, tensor in locals_of(state).items():
                tensor.copy_(stored.get_tensor(name))

    def columns(self, tensor: torch.Tensor, first: int, last: int, path: Path) -> Array:
        with self.library.safe_open(path / self.name, framework="pt") as stored:
            return stored.get_slice(ONE)[:, first:last].contiguous().numpy()

    def close(self) -> None:
        pass


class Torchsnapshot:
    """torchsnapshot. Its release does not support DTensor, so each rank saves plain tensors."""

    def __init__(self, rank: int, ranks: int) -> None:
        import torchsnapshot

        self.library, self.turn = torchsnapshot, (rank, ranks)

    def save(self, state: State, path: Path) -> None:
        self.library.Snapshot.take(str(path), self._app(state))
        sync(path, *self.turn)

    def load(self, state: State, path: Path) -> None:
        app = self._app(state)
        self.library.Snapshot(str(path)).restore(app)
        filled = app["state"]
        for name, tensor in locals_of(state).items():
            if filled[name].data_ptr() != tensor.data_ptr():
                tensor.copy_(filled[name])

    def begin(self, state: State, path: Path) -> Pending:
        pending = self.library.Snapshot.async_take(str(path), self._app(state))
        return SyncedPending(pending.done, pending.wait, lambda: sync(path, *self.turn))

    def _app(self, state: State) -> dict[str, Any]:
        return {"state": self.library.StateDict(**locals_of(state))}

    def close(self) -> None:
        pass


class TorchCheckpointing:
    """torch_checkpointing.

    Its direct writes fail on file systems that require alignment (EINVAL on ext4), so they are
    disabled. It does not sync, so the bench does. It gathers the metadata for resharding on CUDA
    devices only, so several ranks save without it unless `reshard` is set.
    """

    def __init__(self, rank: int, ranks: int, *, reshard: bool = False) -> None:
        self.turn = (rank, ranks)
        self.reshard = reshard or ranks == 1
        self._managers: dict[str, Any] = {}

    def _manager(self, kind: str) -> Any:
        if kind not in self._managers:
            import torch_checkpointing as library
            from torch_checkpointing.config import SyncCheckpointSaverConfig
            from torch_checkpointing.default_resharder import DefaultResharder
            from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

            staging = library.CheckpointStagerConfig(use_async_staging=False)
            kinds = {
                "sync": SyncCheckpointSaverConfig(),
                "async": library.AsyncCheckpointSaverConfig(staging_config=staging),
            }
            spec = library.ItemSpec(resharder=DefaultResharder() if self.reshard else None)
            self._managers[kind] = library.CheckpointManager(
                library.CheckpointManager.Config(
                    items={"state": spec},
                    save=kinds[kind],
                    storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
                )
            )
        return self._managers[kind]

    def save(self, state: State, path: Path) -> None:
        self._manager("sync").save(str(path), {"state": state})
        sync(path, *self.turn)

    def load(self, state: State, path: Path) -> None:
        self._manager("sync").load(str(path), into={"state": state})

    def begin(self, state: State, path: Path) -> Pending:
        future = self._manager("async").save(str(path), {"state": state})
        return SyncedPending(future.done, future.result, lambda: sync(path, *self.turn))

    def close(self) -> None:
        for manager in self._managers.values():
            manager.close()


@contextlib.contextmanager
def copies_by(threads: int) -> Iterator[None]:
    """Let torch copy with that many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Idle:
    """Does nothing, to measure a training loop without a save."""

    def __init__(self, rank: int, ranks: int) -> None:
        pass

    def close(self) -> None:
        pass


def sync(path: Path, rank: int = 0, ranks: int = 1) -> None:
    """Sync a file, or this rank's share of the files of a folder, and the folders themselves."""
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    for one in itertools.islice(files, rank, None, ranks):
        file = os.open(one, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    for folder in {one.parent for one in files} | {path.parent}:
        sync_folder(folder)


MAKERS: dict[str, Callable[..., Contestant]] = {
    "shardkeep": Shardkeep,
    "stock": Stock,
    "torch": Torch,
    "safetensors": Safetensors,
    "torchsnapshot": Torchsnapshot,
    "torch_checkpointing": TorchCheckpointing,
    "idle": Idle,
    "crc": limits.Crc,
    "direct_write": limits.DirectWrite,
    "direct_read": limits.DirectRead,
    "preadv": limits.Preadv,
    "copy": limits.Copy,
    "raw_writer": limits.RawWriterProcess,
}


def make(who: str, rank: int, ranks: int, settings: Mapping[str, Any]) -> Contestant:
    """Return a contestant by its name, with its warnings about deprecations silenced.

    Raises:
        ModuleNotFoundError: the tool is not installed; the message ends with pip's own message.
    """
    warnings.simplefilter("ignore")
    try:
        return MAKERS[who](rank, ranks, **settings)
    except ModuleNotFoundError as error:
        log = Path(sys.prefix) / f"{error.name}.log"
        said = log.read_text().strip().splitlines() if log.exists() else []
        why = f"not installed: {said[-1]}" if said else f"not installed: {error}"
        raise ModuleNotFoundError(why, name=error.name) from None
