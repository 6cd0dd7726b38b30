"""Readers and writers of folders: torch's classes, with Shardkeep's bytes.

Where nothing is customised the engine does a save or load alone, and only takes the options from
here. These methods are for planners and subclasses of the user's own, in the order that torch
documents; they write and read the very same checkpoints.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch.distributed.checkpoint.filesystem as stock
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from shardkeep.checkpoint import commit
from shardkeep.checkpoint.chunk_locations import ChunkLocations
from shardkeep.checkpoint.leases import Lease
from shardkeep.checkpoint.reader import CheckpointReader
from shardkeep.dcp.bridge.commit import commit_one_rank, publish
from shardkeep.dcp.bridge.items import write_containers
from shardkeep.dcp.bridge.metadata import VERSION, index_of, metadata_of
from shardkeep.dcp.bridge.metadata_file import metadata_in
from shardkeep.dcp.bridge.plan_reader import PlanReader
from shardkeep.dcp.bridge.tensor_files import write_tensor_files
from shardkeep.dcp.bridge.torch_filesystem import store_of
from shardkeep.dcp.bridge.torch_modules import forward_to_torch
from shardkeep.errors import AlreadyExists, FormatError, NotACheckpoint, ShardkeepError
from shardkeep.filenames import of_ranks
from shardkeep.format.dcp.metadata_read import merge_metadata
from shardkeep.stores.contract import Store

__all__ = ["FileSystemReader", "FileSystemWriter"]

__getattr__ = forward_to_torch("filesystem")

_SUFFIX = getattr(stock, "DEFAULT_SUFFIX", ".distcp")


class CheckpointExists(AlreadyExists, RuntimeError):
    """What torch raises is a RuntimeError."""


class _Missing(NotACheckpoint, FileNotFoundError):
    """What torch raises is a FileNotFoundError."""


@dataclass
class _Prefix(stock._StoragePrefix):
    """What the names of a rank's files begin with, and the id that makes them new."""

    save_id: str


class _Paths:
    """What early releases do not have; later ones' own comes first."""

    fs: Any
    path: Any

    def _get_metadata_path(self, rank: int | None = None) -> Any:
        name = commit.METADATA if rank is None else f"__{rank}{commit.METADATA}"
        return self.fs.concat_path(self.path, name)


class FileSystemWriter(stock.FileSystemWriter, _Paths):
    """Torch's writer; see there for the options.

    An overwritten checkpoint stays whole until the new one is, files have names that were never
    used before, and a manifest with checksums of all bytes stands beside `.metadata`.
    """

    @wraps(stock.FileSystemWriter.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.save_id = commit.new_id()
        self._begun = ""
        self._lease: Lease | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another save, elsewhere if that is said."""
        super().reset(checkpoint_id)
        self.save_id = commit.new_id()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begin a save, as `rank`, with metadata of this rank's own if not `use_collectives`."""
        self.let_go()
        self.rank = kwargs.get("rank")
        self.use_collectives = kwargs.get("use_collectives", True)
        if self._begun == self.save_id:  # A second save without a reset.
            self.save_id = commit.new_id()
        self._begun = self.save_id

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Make the folder. Raises AlreadyExists if a checkpoint is there that is to stay."""
        self.fs.mkdir(self.path)
        if not getattr(self, "overwrite", True) and self.fs.exists(
            self._get_metadata_path(self._own_rank)
        ):
            raise CheckpointExists(
                f"Checkpoint already exists and self.overwrite=False: {os.fspath(self.path)} "
                "already holds a checkpoint; pass overwrite=True to replace it"
            )
        if self._own_rank is None:
            return plan
        return replace(plan, storage_data=_Prefix(f"__{self._own_rank}_", self._take_lease()))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each rank what its files are called by."""
        if all(plan.storage_data is not None for plan in plans):
            return plans
        new_id = self._take_lease()
        return [
            plan
            if plan.storage_data is not None
            else replace(plan, storage_data=_Prefix(f"__{rank}_", new_id))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write a plan's items, durably; the planner is asked for each when its turn comes.

        Raises:
            OSError: from the file system. Nothing stays of what was written.
            Conflict: something can't be saved; it is named.
        """
        own = getattr(type(self), "_write_data", None)
        if own is not getattr(stock.FileSystemWriter, "_write_data", None):
            theirs: Future[list[WriteResult]] = super().write_data(plan, planner)
            return theirs
        store = store_of(self)
        count = max(1, self.thread_count) if self.single_file_per_rank else len(plan.items)
        prefix = plan.storage_data.prefix
        save_id = getattr(plan.storage_data, "save_id", self._new_id)
        files = [f"{prefix}{number}_{save_id}{_SUFFIX}" for number in range(count)]
        results: Future[list[WriteResult]] = Future()
        try:
            results.set_result(self._write(store, files, plan, planner))
            store.sync()
        except BaseException:
            for file in files:
                with suppress(OSError):  # it must not hide what went wrong
                    store.delete(file)
            self.let_go()
            raise
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit, then remove the checkpoint that was there before."""
        if VERSION is not None:
            metadata.version = VERSION
        written = {one.index: one for listed in results for one in listed}
        metadata.storage_data = {index: one.storage_data for index, one in written.items()}
        metadata.storage_meta = self.storage_meta()
        store, name = store_of(self), self._metadata_name
        if self._lease is None:  # a subclass has named the files
            self._take_lease()
        lease, self._lease = self._lease, None
        assert lease is not None
        with lease:
            lease.confirm()
            if self._own_rank is not None:
                commit_one_rank(store, metadata, written, rank=self._own_rank, name=name)
            else:
                publish(store, metadata, written, lease, ranks=len(results), name=name)

    def let_go(self) -> None:
        """End the lease of a save that will not be finished."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()

    def _take_lease(self) -> str:
        """Say that this save is alive, before any of its files is made; what they are called by.

        Under another name than `.metadata` nobody else finds the commit record. Files that it
        names are then called so that nobody takes them for what a dead save left.
        """
        self.let_go()
        self._lease = Lease(store_of(self), self._new_id)
        self._lease.take()
        standard = self._metadata_name in (commit.METADATA, f"__{self._own_rank}.metadata")
        return self._lease.save_id if standard else f"{self._lease.save_id}_own"

    @property
    def _own_rank(self) -> int | None:
        """This rank, if it has metadata of its own."""
        return None if getattr(self, "use_collectives", True) else self.rank

    @property
    def _new_id(self) -> str:
        """The save's id; another one if the user's own is not of the kind."""
        return self.save_id if re.fullmatch("[0-9a-f]{32}", self.save_id) else commit.new_id()

    @property
    def _metadata_name(self) -> str:
        path = os.fspath(self._get_metadata_path(self._own_rank))
        return str(path).replace(os.sep, "/").rpartition("/")[2]

    def _write(
        self, store: Store, files: Sequence[str], plan: SavePlan, planner: SavePlanner
    ) -> list[WriteResult]:
        threads = max(1, self.thread_count)
        transforms = getattr(self, "transforms", None)
        kinds: Any = getattr(stock, "SerializationFormat", None)
        if kinds is None or self.serialization_format is not kinds.SAFETENSORS:
            return write_containers(
                store, files, plan.items, planner, transforms=transforms, threads=threads
            )
        if getattr(transforms, "extensions", ()):
            raise ValueError("a safetensors file can't hold streams: give no extensions with it")
        return write_tensor_files(store, files, plan.items, planner, threads=threads)


class FileSystemReader(stock.FileSystemReader, _Paths):
    """Torch's reader; see there for the options.

    Metadata is never unpickled, only the bytes that are needed are read, and all of them are
    checked that have a digest.
    """

    @wraps(stock.FileSystemReader.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        registry = "_extension_registry"
        self._extension_registry = kwargs.get(registry, args[1] if len(args) > 1 else None)
        self._source: CheckpointReader | None = None
        self._metadata: Metadata | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another load, from elsewhere if that is said."""
        super().reset(checkpoint_id)
        self._source = self._metadata = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """What the checkpoint holds.

        Args:
            args, kwargs: with `rank=`, what that rank saved for itself (`use_collectives=False`);
                if it did not, what all ranks saved so.

        Raises:
            NotACheckpoint: there is no such metadata. It is a FileNotFoundError, too.
            Untrusted: it holds classes of the user's own, and the job does not trust them.
            FormatError: it is broken or hostile.
            Damaged: it does not match its digest.
        """
        store, rank = store_of(self), kwargs.get("rank")
        metadata: Any
        self._source = None
        if rank is None and self._has_usual_paths:
            self._source = self._with_manifest(store)
        if self._source is None:
            metadata = self._stored_metadata(store, rank)
        else:
            metadata = metadata_of(self._source, self.path)
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Take the places of all items from metadata that was read."""
        self.storage_data = metadata.storage_data
        self.rank = kwargs.get("rank")
        self.use_collectives = kwargs.get("use_collectives", True)
        self._metadata = metadata
        if self.storage_data is None:
            raise AssertionError("metadata without storage_data: nothing says where items are")

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read a plan's items into the planner's memory.

        Raises:
            FormatError: an item is broken, or its path leaves the checkpoint.
            Damaged: bytes are missing or do not match their digest.
            Mismatch: what is stored does not go into the memory.
        """
        store = store_of(self)
        cut = type(self)._slice_file is not stock.FileSystemReader._slice_file
        reading = PlanReader(
            store,
            self._sources(store),
            self.storage_data,
            planner,
            unpack=self._unpack,
            cut=self._cut if cut else None,
        )
        reading.read(plan.items)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @property
    def _has_usual_paths(self) -> bool:
        return type(self)._get_metadata_path is FileSystemReader._get_metadata_path

    @property
    def _unpack(self) -> Any:
        """How streams are undone, where that is the user's own."""
        transforms: Any = getattr(self, "transforms", None)
        usual = type(transforms) is getattr(stock, "_StorageReaderTransforms", None)
        if transforms is None or (usual and self._extension_registry is None):
            return None
        return transforms.transform_load_stream

    def _cut(self, place: Any) -> bytes:
        path = self.fs.concat_path(self.path, place.relative_path)
        with self.fs.create_stream(path, "rb") as stream:
            return bytes(self._slice_file(stream, place).read(-1))

    def _with_manifest(self, store: Store) -> CheckpointReader | None:
        """The checkpoint, if Shardkeep wrote it."""
        if not commit.exists(store, commit.METADATA):
            return None
        found = commit.find(store)
        return CheckpointReader(store, found) if found.kind == "shardkeep" else None

    def _stored_metadata(self, store: Store, rank: int | None) -> Any:
        """The metadata in a file of torch's, as it is; or those of all ranks, in one."""
        path = self._get_metadata_path(rank)
        try:
            with self.fs.create_stream(path, "rb") as stream:
                data = stream.read()
        except Exception as error:
            if self.fs.exists(path):
                raise
            parts = [] if rank is None else [name for _, name in of_ranks(store.list().files)]
            if not parts:
                raise _Missing(f"there is no {path}: no checkpoint is committed there") from error
            index = merge_metadata(
                [(name, store.get_range(name, 0, store.head(name).size)) for name in parts]
            )
            return metadata_of(index)
        return metadata_in(data, file=os.fspath(path))

    def _sources(self, store: Store) -> ChunkLocations | None:
        """Where the chunks are that the checkpoint's index knows, with their checksums if any."""
        if self._source is None and self._has_usual_paths:
            with suppress(ShardkeepError):  # What was read as metadata may be another file.
                self._source = self._with_manifest(store)
        if self._source is not None:
            return self._source.locations
        try:
            return (
                None if self._metadata is None else ChunkLocations(store, index_of(self._metadata))
            )
        except (FormatError, AttributeError, TypeError):
            return None  # Storage of the user's own: each item says itself what it is.
