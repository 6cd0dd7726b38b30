"""Hugging Face checkpoints: folders of safetensors files, with whole or sharded tensors."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import PurePath
from typing import Any

import torch.distributed.checkpoint.filesystem as stock
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from shardkeep import settings
from shardkeep.checkpoint.reader import CheckpointReader
from shardkeep.dcp._consolidate_hf_safetensors import consolidate
from shardkeep.dcp._hf_utils import SHARDED_DIR_NAME, _HFStorageInfo, _metadata_fn
from shardkeep.dcp.bridge.metadata import metadata_of
from shardkeep.dcp.bridge.safetensors import (
    Folder,
    Part,
    SafetensorsFile,
    file_system,
    open_folder,
    part_content,
    read_items,
    target_of,
)
from shardkeep.dcp.bridge.torch_modules import forward_to_torch
from shardkeep.dcp.filesystem import FileSystemReader, FileSystemWriter
from shardkeep.errors import Conflict
from shardkeep.format.safetensors.write import file_name, listing
from shardkeep.io.pool import parallel
from shardkeep.plan.memory_budget import MemoryBudget
from shardkeep.stores.contract import Store

__all__ = ["HuggingFaceStorageReader", "HuggingFaceStorageWriter"]

__getattr__ = forward_to_torch("hf_storage")

_Id = str | os.PathLike[str]


class HuggingFaceStorageWriter(FileSystemWriter):
    """Writes a state of tensors as a set of safetensors files with an index.

    A file appears under its name when it is complete and durable. The index is written last, and
    then the files of an earlier save are removed.

    Args:
        path: a folder, or a URL that fsspec supports.
        fqn_to_index_mapping: tensor -> number of its file, from 1; by default one file, or one for
            each rank that writes tensors.
        thread_count: the minimum number of files that are written at the same time.
        save_distributed: each rank writes the parts that it holds to files of its own. Otherwise
            each tensor is written in full by the rank that holds it.
        enable_consolidation: join the ranks' files at the end. These are then in the sub-folder
            "sharded", and the files of whole tensors in `path`.
        thread_count_consolidation: the number of files that are written at the same time there.

    Example:
        >>> writer = dcp.HuggingFaceStorageWriter("out", save_distributed=True,
        ...                                       enable_consolidation=True)
        >>> dcp.save(model.state_dict(), storage_writer=writer)
    """

    def __init__(
        self,
        path: str,
        fqn_to_index_mapping: dict[str, int] | None = None,
        thread_count: int = 1,
        save_distributed: bool = False,
        enable_consolidation: bool = False,
        thread_count_consolidation: int = 1,
    ) -> None:
        initialise: Any = super().__init__  # Its parameters differ between releases of torch.
        initialise(path=path, thread_count=thread_count)
        formats = getattr(stock, "SerializationFormat", None)
        if formats is not None:
            self.serialization_format = formats.SAFETENSORS
        self.fqn_to_index_mapping = fqn_to_index_mapping
        self.save_distributed = save_distributed
        self.enable_consolidation = enable_consolidation
        self.thread_count_consolidation = thread_count_consolidation
        self.consolidated_output_path: str | None = None
        self.rank: int | None = None
        self.use_collectives = True
        self._set_path(path)

    def _set_path(self, path: _Id) -> None:
        self.fs = file_system(path)
        self.path = self.fs.init_path(path)
        if self.save_distributed and self.enable_consolidation:
            self.consolidated_output_path = str(self.path)
            self.path = self.fs.concat_path(self.path, SHARDED_DIR_NAME)

    def reset(self, checkpoint_id: _Id | None = None) -> None:
        """Prepare for another save, to `checkpoint_id` if it is given."""
        super().reset(None)
        if checkpoint_id:
            self._set_path(checkpoint_id)

    @property
    def metadata_path(self) -> str:
        return _metadata_fn

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Start a save.

        Args:
            is_coordinator: whether this rank commits.
            args: ignored.
            kwargs: `rank`, and `use_collectives`.

        Raises:
            ValueError: `enable_consolidation` is combined with `use_collectives=False`.
        """
        self.rank = kwargs.get("rank")
        self.use_collectives = kwargs.get("use_collectives", True)
        if not self.use_collectives and self.consolidated_output_path is not None:
            raise ValueError("enable_consolidation needs use_collectives=True")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is.

        Raises:
            Conflict: it has values that are not tensors; the message names them.
        """
        _only_tensors(plan.items)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return the plans with the file of each item.

        Raises:
            Conflict: without `save_distributed`, a tensor is sharded, or two ranks would write to
                one file.
        """
        mapping = self.fqn_to_index_mapping
        if not self.save_distributed:
            if not self.use_collectives and self.rank and any(plan.items for plan in plans):
                raise Conflict(
                    f"rank {self.rank} writes tensors with use_collectives=False: pass "
                    "save_distributed=True"
                )
            mapping = _without_shards(plans, mapping)
        first = 1 if self.use_collectives else 1 + (self.rank or 0)
        made = []
        for shard, plan in enumerate(plans, first):
            data: dict[str, Any] = {} if mapping is None else {"fqn_to_index_mapping": mapping}
            if self.save_distributed:
                data["shard_index"] = shard
            made.append(dataclasses.replace(plan, storage_data=data))
        return made

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files.

        Raises:
            Conflict: a tensor can't be stored in a safetensors file; the message names it.
            OSError: from the file system.
        """
        _only_tensors(plan.items)
        files: dict[str, list[Part]] = {}
        results = []
        for item, file in _places(plan):
            parts = files.setdefault(file, [])
            length = 0
            if not _is_empty(item):
                tensor: Any = planner.resolve_data(item)
                parts.append(Part(item.index.fqn, tensor.detach(), _begin(item)))
                length = tensor.numel() * tensor.element_size()
            where = stock._StorageInfo(file, 0, length)
            results.append(WriteResult(item.index, length, where))
        if files:
            content = {file: part_content(parts) for file, parts in files.items()}
            threads = max(self.thread_count, settings.read_threads())
            window = MemoryBudget.of(None).window_bytes(min(threads, len(content)))
            Folder(self.path, self.fs).write(content, threads, window)
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index or consolidate the files; remove the files of earlier saves.

        Raises:
            FormatError: files to consolidate are missing a part or contradict each other.
            ValueError: `fqn_to_index_mapping` lacks a tensor.
        """
        written = [result for of_rank in results for result in of_rank]
        folder = Folder(self.path, self.fs)
        files = {result.storage_data.relative_path for result in written}
        if not self.save_distributed:
            weights = {r.index.fqn: r.storage_data.relative_path for r in written}
            nbytes = sum(result.storage_data.length for result in written)
            folder.store.put(_metadata_fn, listing(weights, nbytes), mode="replace")
        if not self.use_collectives:
            return  # The files of other ranks are unknown, so none can be removed.
        folder.remove_replaced(files, shards=self.save_distributed)
        if not self.save_distributed:
            folder.remove_replaced(set(), shards=True)
        elif self.consolidated_output_path is not None:
            self._consolidate(folder, metadata)
        else:
            # The index of an earlier save would name files that are replaced.
            folder.store.delete(_metadata_fn)
            folder.remove_replaced(set(), shards=False)

    def _consolidate(self, folder: Folder, metadata: Metadata) -> None:
        mapping = self.fqn_to_index_mapping
        if mapping is None:
            mapping = dict.fromkeys(metadata.state_dict_metadata, 1)
        output = Folder(self.fs.init_path(str(self.consolidated_output_path)), self.fs)
        files = consolidate(folder, output, mapping, self.thread_count_consolidation)
        output.remove_replaced(set(files), shards=False)


def _only_tensors(items: Sequence[WriteItem]) -> None:
    objects = [item.index.fqn for item in items if item.type == WriteItemType.BYTE_IO]
    if objects:
        raise Conflict(
            f"safetensors files can hold only tensors, not {', '.join(objects)}: save these values "
            "elsewhere, or as tensors"
        )


def _without_shards(
    plans: Sequence[SavePlan], mapping: dict[str, int] | None
) -> dict[str, int] | None:
    """Return the file number of each tensor if tensors are whole and each file has one writer.

    Args:
        plans: the plans of all ranks.
        mapping: the caller's; by default each rank that has tensors writes one file.

    Raises:
        Conflict: a tensor is sharded, or two ranks would write to one file.
    """
    busy = [rank for rank, plan in enumerate(plans) if plan.items]
    ranks: dict[str, int] = {}
    for rank in busy:
        for item in plans[rank].items:
            if tuple(_data(item).chunk.sizes) != tuple(_data(item).size):
                raise Conflict(f"tensor {item.index.fqn!r} is sharded: pass save_distributed=True")
            ranks[item.index.fqn] = rank
    if mapping is None:
        if len(busy) < 2:
            return None
        return {name: 1 + busy.index(rank) for name, rank in ranks.items()}
    writers: dict[int, int] = {}
    for name, rank in ranks.items():
        other = writers.setdefault(_number(name, mapping), rank)
        if other != rank:
            raise Conflict(
                f"file {mapping[name]} of fqn_to_index_mapping holds tensors of rank {other} and "
                f"rank {rank}: pass save_distributed=True, enable_consolidation=True, or "
                "DefaultSavePlanner(dedup_save_to_lowest_rank=True)"
            )
    return mapping


def _number(name: str, mapping: dict[str, int]) -> int:
    if name not in mapping:
        raise Conflict(f"fqn_to_index_mapping has no entry for tensor {name!r}")
    return mapping[name]


def _places(plan: SavePlan) -> Iterator[tuple[WriteItem, str]]:
    """Yield each item with its file. A file has at most one part of a tensor."""
    data: dict[str, Any] = plan.storage_data or {}
    mapping = data.get("fqn_to_index_mapping")
    last = max(mapping.values()) if mapping else 1
    parts: Counter[str] = Counter()
    for item in plan.items:
        name = item.index.fqn
        number = 1 if mapping is None else _number(name, mapping)
        parts[name] += not _is_empty(item)
        yield item, file_name(number, last, data.get("shard_index"), max(parts[name], 1))


def _is_empty(item: WriteItem) -> bool:
    """Return whether an item is an empty part of a tensor that is not empty."""
    data = _data(item)
    return not prod(data.chunk.sizes) and bool(prod(data.size))


def _begin(item: WriteItem) -> tuple[int, ...]:
    return tuple(_data(item).chunk.offsets)


def _data(item: WriteItem) -> Any:
    return item.tensor_data


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class HuggingFaceStorageReader(FileSystemReader):
    """Reads a folder of safetensors files, including tensors that ranks have written in parts.

    Args:
        path: a folder, or a URL that fsspec supports.
        thread_count: the minimum number of threads that read.

    Example:
        >>> reader = dcp.HuggingFaceStorageReader("Llama-3.1-8B")
        >>> dcp.load(state, storage_reader=reader)
    """

    def __init__(self, path: str, thread_count: int = 1) -> None:
        initialise: Any = super().__init__  # Its parameters differ between releases of torch.
        initialise(path)
        self.thread_count = thread_count
        self._set_path(path)

    def _set_path(self, path: _Id) -> None:
        self.fs = file_system(path)
        self.path = self.fs.init_path(path)
        self._source: CheckpointReader | None = None

    def reset(self, checkpoint_id: _Id | None = None) -> None:
        """Prepare for another load, from `checkpoint_id` if it is given."""
        super().reset(None)
        self._set_path(checkpoint_id or self.path)

    def read_metadata(self) -> Metadata:
        """Return the metadata of the tensors in the files, by the headers of these.

        Raises:
            NotACheckpoint: the folder has no safetensors file.
            FormatError: a file is malformed or hostile, or files contradict each other.
        """
        self._source = self._open()
        metadata = metadata_of(self._source)
        metadata.storage_data = {
            index: self._info(metadata, index, info.relative_path)
            for index, info in metadata.storage_data.items()
        }
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def _info(self, metadata: Metadata, index: MetadataIndex, file: str) -> _HFStorageInfo:
        entry: Any = metadata.state_dict_metadata[index.fqn]
        path = str(self.fs.concat_path(self.path, file))
        return _HFStorageInfo(path, entry.chunks[index.index].sizes, entry.properties.dtype)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self.storage_data = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the items of a plan, and no other bytes.

        Raises:
            Mismatch: a tensor of the planner's has another shape than its item.
            FormatError: the files hold only a part of a tensor.
            Damaged: bytes are missing.
        """
        source = self._source or self._open()
        alone: dict[str, list[ReadItem]] = {}
        together = []
        for item in plan.items:
            if self._reads_alone(item):
                file = PurePath(self.storage_data[item.storage_index].relative_path).name
                alone.setdefault(file, []).append(item)
            else:
                together.append(item)
        read_items(source, together, planner, max(self.thread_count, settings.read_threads()))

        def worker(files: Iterator[str]) -> None:
            for file in files:
                opened = SafetensorsFile(source.store, file)
                for item in alone[file]:
                    self._process_read_request(opened, item, planner)

        parallel(list(alone), worker, self.thread_count)
        return _done(None)

    def _open(self) -> CheckpointReader:
        return open_folder(self._store())

    def _store(self) -> Store:
        return Folder(self.path, self.fs).store

    def _reads_alone(self, item: ReadItem) -> bool:
        """Return whether an item is read by `_process_read_request`: if a subclass overrides it."""
        default = HuggingFaceStorageReader._process_read_request
        return type(self)._process_read_request is not default

    def _process_read_request(self, f: Any, req: ReadItem, planner: LoadPlanner) -> None:
        """Read one item from an open file that has the methods of safetensors' `safe_open`."""
        ranges = zip(req.storage_offsets, req.lengths, strict=False)
        slices = tuple(slice(begin, begin + length) for begin, length in ranges)
        tensor = f.get_slice(req.storage_index.fqn)[slices]
        target = target_of(req, planner)
        target.copy_(tensor)
        planner.commit_tensor(req, target)
