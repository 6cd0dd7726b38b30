"""Folders of safetensors files, which torch's Hugging Face readers and writers use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from secrets import token_hex
from typing import Any
from warnings import warn

import numpy as np
import torch
import torch.distributed.checkpoint.filesystem as stock_files
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from shardkeep.checkpoint import commit
from shardkeep.checkpoint.reader import CheckpointReader, Request
from shardkeep.dcp.bridge.batches import batches
from shardkeep.dcp.bridge.torch_filesystem import replace, store_of
from shardkeep.dcp.bridge.torch_modules import torch_module
from shardkeep.errors import Mismatch, NotACheckpoint
from shardkeep.format.safetensors import parse
from shardkeep.format.safetensors.write import is_file_name, layout, of_parts
from shardkeep.io.contract import Payloads
from shardkeep.io.pool import parallel
from shardkeep.io.write.files import write_plain_file
from shardkeep.stores.contract import Store
from shardkeep.torch_state.memory import destination, is_contiguous_on_cpu
from shardkeep.torch_state.payloads import StatePayloads
from shardkeep.types import I64, Box, DType

__all__ = [
    "FileContent",
    "Folder",
    "Part",
    "SafetensorsFile",
    "box_of",
    "file_system",
    "open_folder",
    "part_content",
    "read_items",
    "target_of",
    "torch_dtype",
]

_SHOWN = 5


def file_system(path: Any) -> Any:
    """Return the file system for a path: torch's own for a local path, fsspec's for a URL."""
    if "://" not in str(path):
        return stock_files.FileSystem()
    fsspec = torch_module("fsspec_filesystem", "_fsspec_filesystem")
    kind = getattr(fsspec, "_FileSystem", None) or getattr(fsspec, "FileSystem", None)
    if kind is None:
        raise ValueError(f"{path}: URLs need fsspec, which is not installed")
    return kind()


class Folder:
    """A folder of safetensors files.

    Args:
        path: the folder. If `fs` is given, in the form that it uses.
        fs: a file system of torch; by default the one for the path.
    """

    def __init__(self, path: Any, fs: Any = None) -> None:
        self.fs = fs or file_system(path)
        self.path = self.fs.init_path(path) if fs is None else path
        self.store: Store = store_of(self)

    def write(self, files: Mapping[str, FileContent], threads: int, max_window_bytes: int) -> None:
        """Write files durably. Each appears under its name once all of them are complete.

        Args:
            files: name -> content.
            threads: number of files that are written at a time.
            max_window_bytes: memory that each thread may use for its writes, in bytes.

        Raises:
            OSError: from the store, naming the file. Unfinished files are removed.
        """
        token = token_hex(8)
        unfinished = {f"{name}.{token}.tmp": name for name in files}

        def worker(names: Iterator[str]) -> None:
            for temporary in names:
                content = files[unfinished[temporary]]
                write_plain_file(
                    self.store,
                    temporary,
                    content.rows,
                    content.nbytes,
                    content.payloads,
                    max_window_bytes=max_window_bytes,
                    checksums=False,
                )

        try:
            parallel(list(unfinished), worker, threads)
            for temporary, name in unfinished.items():
                path = self.fs.concat_path
                replace(self.fs, path(self.path, temporary), path(self.path, name))
        except BaseException:
            for temporary in unfinished:
                with suppress(OSError):
                    self.store.delete(temporary)
            raise
        self.store.sync()

    def remove_replaced(self, kept: set[str], *, shards: bool) -> None:
        """Remove the files of earlier saves: those of shards, or those of whole tensors."""
        for name in self.store.list().files:
            sharded = name.startswith("shard-")
            if is_file_name(name) and sharded == shards and name not in kept:
                self.store.delete(name)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A tensor to be written to a file, and its offset in the global tensor."""

    name: str
    tensor: torch.Tensor
    begin: tuple[int, ...]

    @property
    def dtype(self) -> DType:
        return DType.named(str(self.tensor.dtype))


@dataclass(frozen=True, slots=True, eq=False)
class FileContent:
    """The content of a file: payloads one after the other, without gaps.

    Attributes:
        rows: [N] rows of `payloads`, in the order of the file.
        nbytes: [N] bytes of each payload.
        payloads: the bytes.
    """

    rows: I64
    nbytes: I64
    payloads: Payloads


def part_content(parts: Sequence[Part]) -> FileContent:
    """Return the content of a file of tensors; raise Conflict if the format cannot hold one."""
    by_name = {part.name: part for part in parts}
    laid_out = layout(
        {part.name: (part.dtype, tuple(part.tensor.shape)) for part in parts},
        of_parts({part.name: part.begin for part in parts}),
    )
    tensors = [by_name[name].tensor for name in laid_out.names]
    addresses = [tensor.data_ptr() if is_contiguous_on_cpu(tensor) else 0 for tensor in tensors]
    count = len(tensors)
    return FileContent(
        rows=np.array([count, *range(count)], np.int64),
        nbytes=np.array([len(laid_out.header), *(tensor.nbytes for tensor in tensors)], np.int64),
        payloads=StatePayloads(tensors, np.array(addresses, np.int64), [laid_out.header]),
    )


def open_folder(store: Store, *, listed: bool = True) -> CheckpointReader:
    """Return a reader for the safetensors files of a folder. Other files are ignored.

    Args:
        store: the folder.
        listed: use the index of the set, if there is one, to decide which of several files holds a
            tensor. It may list files that are missing, since parts of a set can be loaded, too.

    Raises:
        NotACheckpoint: there are no such files.
        FormatError: a file is damaged or hostile, or files contradict each other.
    """
    names = sorted(name for name in store.list().files if _is_tensors(name))
    if not names:
        raise NotACheckpoint(f"{store.url} has no .safetensors file")
    headers = commit.headers(store, names)
    weights = (commit.weights(store) if listed else None) or {}
    known = {
        name: file
        for name, file in weights.items()
        if file in headers and name in headers[file].tensors
    }
    return _checkpoint(store, headers, known)


def _is_tensors(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name


def _checkpoint(
    store: Store, headers: Mapping[str, parse.Header], weights: Mapping[str, str]
) -> CheckpointReader:
    index = parse.index_of(headers, weights)
    first = next(iter(headers))
    return CheckpointReader(store, commit.Found.whole("safetensors", first, lambda: index))


class SafetensorsFile:
    """One safetensors file, with the methods of the object that safetensors' `safe_open` returns.

    Each shard is a tensor of its own here. Only the requested bytes are read.
    """

    def __init__(self, store: Store, name: str) -> None:
        header = commit.headers(store, [name])[name]
        self._metadata = dict(header.metadata)
        alone = parse.Header(header.tensors, {})
        self._source = _checkpoint(store, {name: alone}, {})

    def keys(self) -> list[str]:
        return list(self._source)

    def metadata(self) -> dict[str, str]:
        return self._metadata

    def get_slice(self, name: str) -> _Slice:
        """Return an object that reads the part of a tensor that it is indexed with."""
        return _Slice(self._source, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.get_slice(name)[()]


class _Slice:
    def __init__(self, source: CheckpointReader, name: str) -> None:
        self._source, self._name = source, name
        self._dtype, self._shape = source.dtype_and_shape(name)

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def __getitem__(self, slices: tuple[slice, ...]) -> torch.Tensor:
        """Return the part for slices of step 1. Dimensions without a slice are read in full."""
        given = [*slices, *[slice(None)] * (len(self._shape) - len(slices))]
        ranges = [range(*s.indices(n)) for s, n in zip(given, self._shape, strict=True)]
        box = Box(tuple(r.start for r in ranges), tuple(map(len, ranges)))
        tensor = torch.empty(box.sizes, dtype=torch_dtype(self._dtype))
        into, finish = destination(tensor, self._dtype)
        self._source.fill([Request(self._name, box, into)], threads=1)
        finish()
        return tensor


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's dtype for a dtype. Raise Mismatch if this release of torch lacks it."""
    found = getattr(torch, dtype.name, None)
    if not isinstance(found, torch.dtype):
        raise Mismatch(f"torch {torch.__version__} has no dtype {dtype}")
    return found


def box_of(item: ReadItem) -> Box:
    """Return the box that a read item requests, in coordinates of the global tensor."""
    begin = item.storage_index.offset or [0] * len(item.lengths)
    inside = item.storage_offsets
    offsets = (b + i for b, i, _ in zip(begin, inside, item.lengths, strict=False))
    return Box(tuple(offsets), tuple(item.lengths))


def read_items(
    source: CheckpointReader, items: Sequence[ReadItem], planner: LoadPlanner, threads: int
) -> None:
    """Fill the tensors that the planner provides for these items, with few reads of each file.

    Raises:
        Mismatch: a tensor of the planner does not have the size that the plan requests.
        FormatError: the files do not hold all of a tensor.
        Damaged: a file is missing or too short.
    """
    cast: dict[str, str] = {}

    def nbytes(item: ReadItem) -> int:
        return prod(item.lengths) * source.dtype_and_shape(item.storage_index.fqn)[0].itemsize

    for batch in batches(items, nbytes, planner):
        requests, landed = [], []
        for item in batch:
            name = item.storage_index.fqn
            target = target_of(item, planner)
            dtype, _ = source.dtype_and_shape(name)
            if target.dtype != torch_dtype(dtype):
                wanted = str(target.dtype).removeprefix("torch.")
                cast[name] = f"{name}: stored as {dtype}, cast to {wanted}"
            into, finish = destination(target, dtype)
            requests.append(Request(name, box_of(item), into))
            landed.append((item, target, finish))
        source.fill(requests, threads=threads)
        for item, target, finish in landed:
            finish()
            planner.commit_tensor(item, target)
    if cast:
        shown = list(cast.values())[:_SHOWN]
        more = [f"and {len(cast) - _SHOWN} more"] if len(cast) > _SHOWN else []
        warn("; ".join(shown + more), stacklevel=3)


def target_of(item: ReadItem, planner: LoadPlanner) -> torch.Tensor:
    """Return the tensor to be filled. Raise Mismatch if it does not have the sizes of the item."""
    target = planner.resolve_tensor(item).detach()
    if tuple(target.shape) != tuple(item.lengths):
        raise Mismatch(
            f"{item.storage_index.fqn!r}: the plan asks for a part of shape {list(item.lengths)}, "
            f"the planner has a tensor of shape {list(target.shape)} for it"
        )
    return target
