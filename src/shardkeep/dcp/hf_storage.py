"""Hugging Face checkpoints: folders of safetensors files, whole or sharded by ranks."""

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
    part_items,
    read_items,
    target_of,
)
from shardkeep.dcp.bridge.torch_modules import forward_to_torch
from shardkeep.dcp.filesystem import FileSystemReader, FileSystemWriter
from shardkeep.errors import Conflict
from shardkeep.format.safetensors.write import file_name, listing
from shardkeep.io.pool import parallel
from shardkeep.stores.contract import Store

__all__ = ["HuggingFaceStorageReader", "HuggingFaceStorageWriter"]

__getattr__ = forward_to_torch("hf_storage")

_Id = str | os.PathLike[str]


class HuggingFaceStorageWriter(FileSystemWriter):
    """Writes a state of tensors as safetensors files, and the index of the set.

    A file appears under its name when it is complete and durable, and the index comes last. Files
    of an earlier save are removed then.

    Args:
        path: a folder, or a URL that fsspec knows.
        fqn_to_index_mapping: tensor -> which file it goes to, counted from 1; by default one file,
            or one for each rank that has something to write.
        thread_count: files that are written at a time, at least.
        save_distributed: each rank writes the parts that it holds, to files of its own. Otherwise
            tensors are written whole, each by the rank that holds it.
        enable_consolidation: join the ranks' files at the end: they are in the sub-folder
            "sharded" then, and the whole tensors in `path`.
        thread_count_consolidation: files that are written at a time there.
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
        begin: Any = super().__init__
        begin(path=path, thread_count=thread_count)
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
        self._go_to(path)

    def _go_to(self, path: _Id) -> None:
        self.fs = file_system(path)
        self.path = self.fs.init_path(path)
        if self.save_distributed and self.enable_consolidation:
            self.consolidated_output_path = str(self.path)
            self.path = self.fs.concat_path(self.path, SHARDED_DIR_NAME)

    def reset(self, checkpoint_id: _Id | None = None) -> None:
        """Begin another save, to `checkpoint_id` if there is one."""
        super().reset(None)
        if checkpoint_id:
            self._go_to(checkpoint_id)

    @property
    def metadata_path(self) -> str:
        return _metadata_fn

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError where ranks save for themselves and files should be consolidated."""
        self.rank = kwargs.get("rank")
        self.use_collectives = kwargs.get("use_collectives", True)
        if not self.use_collectives and self.consolidated_output_path is not None:
            raise ValueError("enable_consolidation needs use_collectives=True")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Raises Conflict if there are values that are not tensors, naming them."""
        _only_tensors(plan.items)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell every rank where its items go.

        Raises:
            Conflict: without `save_distributed`, a tensor is in parts, or two ranks would write
                one file.
        """
        mapping = self.fqn_to_index_mapping
        if not self.save_distributed:
            if not self.use_collectives and self.rank and any(plan.items for plan in plans):
                raise Conflict("ranks that save for themselves need save_distributed=True")
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
        """Write this rank's files. Raises Conflict for what safetensors can't hold, and OSError."""
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
            content = {file: part_items(parts) for file, parts in files.items()}
            threads = max(self.thread_count, settings.read_threads())
            Folder(self.path, self.fs).write(content, threads)
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Remove the files of earlier saves; consolidate, or write the index, as it was asked for.

        Raises as `consolidate_safetensors_files` does.
        """
        written = [result for of_rank in results for result in of_rank]
        folder = Folder(self.path, self.fs)
        files = {result.storage_data.relative_path for result in written}
        if not self.save_distributed:
            weights = {r.index.fqn: r.storage_data.relative_path for r in written}
            nbytes = sum(result.storage_data.length for result in written)
            folder.store.put(_metadata_fn, listing(weights, nbytes), mode="replace")
        if not self.use_collectives:
            return  # Other ranks' files are not known here.
        folder.remove_replaced(files, shards=self.save_distributed)
        if not self.save_distributed:
            folder.remove_replaced(set(), shards=True)
        elif self.consolidated_output_path is not None:
            self._consolidate(folder, metadata)
        else:
            # What an index of an earlier save says is no longer so.
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
            f"safetensors files hold tensors only, and these are none: {', '.join(objects)}; "
            "save them elsewhere, or as tensors"
        )


def _without_shards(
    plans: Sequence[SavePlan], mapping: dict[str, int] | None
) -> dict[str, int] | None:
    """Which file each tensor goes to, where tensors are whole, and a file is one rank's."""
    busy = [rank for rank, plan in enumerate(plans) if plan.items]
    ranks: dict[str, int] = {}
    for rank in busy:
        for item in plans[rank].items:
            if tuple(_data(item).chunk.sizes) != tuple(_data(item).size):
                raise Conflict(f"tensor {item.index.fqn!r} is in parts: use save_distributed=True")
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
                f"rank {rank}: use save_distributed=True, enable_consolidation=True, or "
                "DefaultSavePlanner(dedup_save_to_lowest_rank=True)"
            )
    return mapping


def _number(name: str, mapping: dict[str, int]) -> int:
    if name not in mapping:
        raise Conflict(f"tensor {name!r} is not in fqn_to_index_mapping")
    return mapping[name]


def _places(plan: SavePlan) -> Iterator[tuple[WriteItem, str]]:
    """The items, and the file that each goes to: a file has one part of a tensor at most."""
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
    """Whether it is a part without elements of a tensor that has some."""
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
    """Reads a folder of safetensors files; what ranks wrote in parts is put together again.

    Args:
        path: a folder, or a URL that fsspec knows.
        thread_count: threads that read, at least.
    """

    def __init__(self, path: str, thread_count: int = 1) -> None:
        begin: Any = super().__init__
        begin(path)
        self.thread_count = thread_count
        self._go_to(path)

    def _go_to(self, path: _Id) -> None:
        self.fs = file_system(path)
        self.path = self.fs.init_path(path)
        self._source: CheckpointReader | None = None

    def reset(self, checkpoint_id: _Id | None = None) -> None:
        """Begin another load, from `checkpoint_id` if there is one."""
        super().reset(None)
        self._go_to(checkpoint_id or self.path)

    def read_metadata(self) -> Metadata:
        """What the files hold, by their headers.

        Raises:
            NotACheckpoint: there are none.
            FormatError: one is broken or hostile, or they contradict each other.
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
        """Read what a plan asks for, and no more.

        Raises:
            Mismatch: the planner's tensors are not as its plan says.
            FormatError: the files do not hold all of a tensor.
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
        """Whether an item goes through `_process_read_request`: if that is a user's own."""
        mine = HuggingFaceStorageReader._process_read_request
        return type(self)._process_read_request is not mine

    def _process_read_request(self, f: Any, req: ReadItem, planner: LoadPlanner) -> None:
        """Read one item out of an open file, one like safetensors' own."""
        ranges = zip(req.storage_offsets, req.lengths, strict=False)
        slices = tuple(slice(begin, begin + length) for begin, length in ranges)
        tensor = f.get_slice(req.storage_index.fqn)[slices]
        target = target_of(req, planner)
        target.copy_(tensor)
        planner.commit_tensor(req, target)
