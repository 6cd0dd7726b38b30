"""Readers and writers of folders: subclasses of torch's that write Shardkeep's files.

If nothing is customised, the engine saves and loads alone, and only takes its options from these
objects. Their methods are called for planners and subclasses of the user's own, in the order that
torch documents. Both ways write and read the same checkpoints.
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
from shardkeep.dcp.bridge.commit import commit_all_ranks, commit_one_rank
from shardkeep.dcp.bridge.items import write_containers
from shardkeep.dcp.bridge.metadata import VERSION, index_of, metadata_of
from shardkeep.dcp.bridge.metadata_file import metadata_in
from shardkeep.dcp.bridge.plan_reader import PlanReader
from shardkeep.dcp.bridge.tensor_files import write_tensor_files
from shardkeep.dcp.bridge.torch_filesystem import store_of
from shardkeep.dcp.bridge.torch_messages import CHECKPOINT_EXISTS
from shardkeep.dcp.bridge.torch_modules import forward_to_torch
from shardkeep.errors import AlreadyExists, FormatError, NotACheckpoint, ShardkeepError
from shardkeep.filenames import of_ranks
from shardkeep.format.dcp.metadata_read import merge_metadata
from shardkeep.stores.contract import Store

__all__ = ["FileSystemReader", "FileSystemWriter"]

__getattr__ = forward_to_torch("filesystem")

_SUFFIX = getattr(stock, "DEFAULT_SUFFIX", ".distcp")


class CheckpointExists(AlreadyExists, RuntimeError):
    """A checkpoint that must not be overwritten; a RuntimeError, as in torch."""


class _Missing(NotACheckpoint, FileNotFoundError):
    """No committed checkpoint; a FileNotFoundError, as in torch."""


@dataclass
class _Prefix(stock._StoragePrefix):
    """The start of the names of a rank's files, and the id that makes them unique."""

    save_id: str


class _Paths:
    """Methods that early releases lack; in later ones torch's own come first."""

    fs: Any
    path: Any

    def _get_metadata_path(self, rank: int | None = None) -> Any:
        name = commit.METADATA if rank is None else f"__{rank}{commit.METADATA}"
        return self.fs.concat_path(self.path, name)


class FileSystemWriter(stock.FileSystemWriter, _Paths):
    """Writes checkpoints to a folder; a subclass of torch's writer, with its options.

    A checkpoint that is replaced can be loaded until the new one is durable: new files have names
    that were never used before. A manifest beside `.metadata` has checksums of all bytes.

    Args:
        path: the folder.
        single_file_per_rank: whether each rank writes `thread_count` files, or one per item.
        sync_files: accepted as in torch; local files are always synced.
        thread_count: the number of files that each rank writes at the same time.
        per_thread_copy_ahead: accepted as in torch.
        cache_staged_state_dict: whether `async_save` keeps its staging memory between saves.
        overwrite: whether a checkpoint at the same path is replaced.

    Example:
        >>> writer = dcp.FileSystemWriter("run/step_100", thread_count=4, overwrite=False)
        >>> dcp.save(state, storage_writer=writer)
    """

    @wraps(stock.FileSystemWriter.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.save_id = commit.new_id()
        self._begun = ""
        self._lease: Lease | None = None
        self._commits = False
        self._admission: commit.Admission | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Prepare for another save, to `checkpoint_id` if it is given."""
        super().reset(checkpoint_id)
        self.save_id = commit.new_id()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Start a save.

        Args:
            is_coordinator: whether this rank commits.
            args: ignored.
            kwargs: `rank`, and `use_collectives`: False to commit what this rank holds alone.
        """
        self.release_lease()
        self.rank = kwargs.get("rank")
        self.use_collectives = kwargs.get("use_collectives", True)
        self._commits = is_coordinator or not self.use_collectives
        self._admission = None
        if self._begun == self.save_id:  # A second save without a reset needs an id of its own.
            self.save_id = commit.new_id()
        self._begun = self.save_id

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Create the folder.

        Raises:
            CheckpointExists: it holds a checkpoint, and `overwrite` is False.
        """
        self.fs.mkdir(self.path)
        if not getattr(self, "overwrite", True) and self.fs.exists(
            self._get_metadata_path(self._own_rank)
        ):
            raise CheckpointExists(
                f"{CHECKPOINT_EXISTS}: {os.fspath(self.path)} already holds a checkpoint; pass "
                "overwrite=True to replace it"
            )
        if self._commits:
            self._admission = self._admit()
        if self._own_rank is None:
            return plan
        return replace(plan, storage_data=_Prefix(f"__{self._own_rank}_", self._take_lease()))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return the plans with the prefix of each rank's file names."""
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
        """Write a plan's items durably, asking the planner for each item when it is written.

        Raises:
            OSError: from the file system. The files that were written are removed.
            Conflict: an object can't be saved; the message names it.
        """
        own = getattr(type(self), "_write_data", None)
        if own is not getattr(stock.FileSystemWriter, "_write_data", None):
            written: Future[list[WriteResult]] = super().write_data(plan, planner)
            return written
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
                with suppress(OSError):  # The first error is the one to raise.
                    store.delete(file)
            self.release_lease()
            raise
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit the checkpoint, then remove the files of the one that it replaces."""
        if VERSION is not None:
            metadata.version = VERSION
        written = {result.index: result for of_rank in results for result in of_rank}
        metadata.storage_data = {index: r.storage_data for index, r in written.items()}
        metadata.storage_meta = self.storage_meta()
        store, name = store_of(self), self._metadata_name
        admission = self._admission or self._admit()
        if self._lease is None:  # A subclass has chosen the names of the files.
            self._take_lease()
        lease, self._lease = self._lease, None
        assert lease is not None
        rank = self._own_rank
        options: dict[str, Any] = {"name": name, "admission": admission}
        try:
            with lease:
                if rank is not None:
                    commit_one_rank(store, metadata, written, lease, rank=rank, **options)
                else:
                    commit_all_ranks(store, metadata, written, lease, ranks=len(results), **options)
        except AlreadyExists as error:
            raise CheckpointExists(str(error)) from error

    def _admit(self) -> commit.Admission:
        """Note which commit record this save may replace."""
        version = commit.record_version(store_of(self), self._metadata_name)
        return commit.Admission(getattr(self, "overwrite", True), version)

    def release_lease(self) -> None:
        """Release the lease of a save that was finished or given up."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()

    def _take_lease(self) -> str:
        """Take the lease of this save, before it creates files; return the id in their names.

        A commit record under another name than `.metadata` is found only by this writer. Its files
        then get names by which they are not mistaken for what a dead save has left behind.
        """
        self.release_lease()
        self._lease = Lease(store_of(self), self._new_id)
        self._lease.take()
        standard = self._metadata_name in (commit.METADATA, f"__{self._own_rank}.metadata")
        return self._lease.save_id if standard else f"{self._lease.save_id}_own"

    @property
    def _own_rank(self) -> int | None:
        """This rank, if it commits alone; otherwise None."""
        return None if getattr(self, "use_collectives", True) else self.rank

    @property
    def _new_id(self) -> str:
        """The id of the save; a new one if a subclass has set one of another form."""
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
            raise ValueError(
                "serialization_format SAFETENSORS can't be combined with stream extensions: pass "
                "no _extensions, or use TORCH_SAVE"
            )
        return write_tensor_files(store, files, plan.items, planner, threads=threads)


class FileSystemReader(stock.FileSystemReader, _Paths):
    """Reads checkpoints from a folder; a subclass of torch's reader.

    Only the bytes that are needed are read, and each is checked if the checkpoint has a checksum
    of it. The pickle of the metadata is interpreted without executing anything.

    Args:
        path: the folder.

    Example:
        >>> reader = dcp.FileSystemReader("run/step_100")
        >>> list(reader.read_metadata().state_dict_metadata)
        ['model.weight', 'step']
    """

    @wraps(stock.FileSystemReader.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        registry = "_extension_registry"
        self._extension_registry = kwargs.get(registry, args[1] if len(args) > 1 else None)
        self._source: CheckpointReader | None = None
        self._metadata: Metadata | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Prepare for another load, from `checkpoint_id` if it is given."""
        super().reset(checkpoint_id)
        self._source = self._metadata = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """Return the metadata of the checkpoint.

        Args:
            args: ignored.
            kwargs: `rank`, for what that rank has committed alone (`use_collectives=False`). If it
                has not, what all ranks have committed alone is returned as one.

        Raises:
            NotACheckpoint: there is no such metadata. It is a FileNotFoundError, too.
            Untrusted: it holds classes of the user's own that the job does not trust.
            FormatError: it is malformed or hostile.
            Damaged: it does not match its checksum.
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
        about = getattr(metadata, "storage_meta", None) or StorageMeta()
        about.load_id, metadata.storage_meta = self.load_id, about
        return metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Take the locations of all items from metadata that was read.

        Args:
            metadata: what `read_metadata` has returned.
            is_coordinator: ignored.
            args: ignored.
            kwargs: `rank`, and `use_collectives`, as the ranks saved.
        """
        if metadata.storage_data is None:
            raise AssertionError("the metadata has no storage_data, so items can't be located")
        self._metadata, self.storage_data = metadata, metadata.storage_data
        self.use_collectives = kwargs.get("use_collectives", True)
        self.rank = kwargs.get("rank")

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read a plan's items into the planner's memory.

        Raises:
            FormatError: an item is malformed, or its path leaves the checkpoint.
            Damaged: bytes are missing or do not match their checksum.
            Mismatch: a stored value does not fit into the planner's memory.
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
        """The function that undoes stream transforms, if it is the user's own."""
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
        """Return the checkpoint if Shardkeep wrote it, otherwise None."""
        if not commit.exists(store, commit.METADATA):
            return None
        found = commit.find(store)
        return CheckpointReader(store, found) if found.kind == "shardkeep" else None

    def _stored_metadata(self, store: Store, rank: int | None) -> Any:
        """Return the metadata in a file of torch's, or that of all ranks as one."""
        path = self._get_metadata_path(rank)
        try:
            with self.fs.create_stream(path, "rb") as stream:
                data = stream.read()
        except Exception as error:
            if self.fs.exists(path):
                raise
            parts = [] if rank is None else [name for _, name in of_ranks(store.list().files)]
            if not parts:
                raise _Missing(
                    f"{path} does not exist: no checkpoint is committed there"
                ) from error
            index = merge_metadata(
                [(name, store.get_range(name, 0, store.head(name).size)) for name in parts]
            )
            return metadata_of(index)
        return metadata_in(data, file=os.fspath(path))

    def _sources(self, store: Store) -> ChunkLocations | None:
        """Return the locations of chunks by the checkpoint's index, or None without an index."""
        if self._source is None and self._has_usual_paths:
            with suppress(ShardkeepError):  # The metadata may have been read from another file.
                self._source = self._with_manifest(store)
        if self._source is not None:
            return self._source.locations
        try:
            return (
                None if self._metadata is None else ChunkLocations(store, index_of(self._metadata))
            )
        except (FormatError, AttributeError, TypeError):
            return None  # Storage of the user's own: each item is read by what it holds.
