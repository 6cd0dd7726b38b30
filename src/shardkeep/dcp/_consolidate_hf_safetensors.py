"""Consolidation of sharded safetensors files into files of whole tensors.

Tensors are copied in slabs, so none of them needs to fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from warnings import warn

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from shardkeep import settings
from shardkeep.checkpoint.reader import CheckpointReader, Request
from shardkeep.coordination import detect_ranks
from shardkeep.dcp.bridge.ranks import members
from shardkeep.dcp.bridge.safetensors import FileContent, Folder, open_folder
from shardkeep.dcp.bridge.torch_modules import forward_to_torch
from shardkeep.format.safetensors.parse import INDEX
from shardkeep.format.safetensors.write import file_name, layout, listing, of_wholes
from shardkeep.io.arena import copy_memory
from shardkeep.io.contract import Payloads
from shardkeep.plan.memory_budget import MemoryBudget
from shardkeep.plan.packing import pack
from shardkeep.types import Box

__all__ = [
    "consolidate",
    "consolidate_safetensors_files",
    "consolidate_safetensors_files_on_every_rank",
]

__getattr__ = forward_to_torch("_consolidate_hf_safetensors")

_MAX_SLAB_BYTES = 16 << 20
"""Size limit of the slab that a thread reads at a time."""

_MAX_NAMES_SHOWN = 5

_Files = dict[str, list[str]]
"""File -> names of the tensors that are written to it."""


def consolidate_safetensors_files(
    input_dir: str,
    output_dir: str,
    fqn_to_index_mapping: dict[str, int],
    num_threads: int = 1,
) -> None:
    """Consolidate the files that ranks wrote (`DCP_SHARDING_INFO`) into files of whole tensors.

    The new files are named as in Hugging Face's sets. They appear when all of them are complete,
    and the index is written last. No file is removed.

    Args:
        input_dir, output_dir: folders, or URLs that fsspec supports.
        fqn_to_index_mapping: tensor -> number of its output file, from 1 on.
        num_threads: number of files that are written at a time. All of them share the memory budget
            `SHARDKEEP_MAX_HOST_MEMORY_BYTES`.

    Raises:
        NotACheckpoint: the input has no safetensors file.
        FormatError: a shard is missing, or files are damaged or contradict each other.
        ValueError: the mapping is empty or lacks a tensor. Nothing was written.
    """
    consolidate(Folder(input_dir), Folder(output_dir), fqn_to_index_mapping, num_threads)


def consolidate_safetensors_files_on_every_rank(
    input_dir: str,
    output_dir: str,
    fqn_to_index_mapping: dict[str, int],
    num_threads: int = 1,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Consolidate files of whole tensors with all ranks of a group, which share the work evenly.

    The input and output are as in `consolidate_safetensors_files`. No collective is called.

    Args:
        input_dir, output_dir: folders, or URLs that fsspec supports.
        fqn_to_index_mapping: tensor -> number of its output file, from 1 on.
        num_threads: number of files that each rank writes at a time.
        process_group: the ranks that take part; by default all.

    Raises:
        NotACheckpoint: the input has no safetensors file.
        FormatError: a shard is missing, or files are damaged or contradict each other.
        ValueError: the mapping is empty or lacks a tensor. Nothing was written.
        RankFailed: another rank failed. No index was written.
    """
    _, ranks = members(process_group, 0, False)
    output = Folder(output_dir)
    with detect_ranks(ranks).session("consolidate", output.store.url) as session:
        source, files = _open(Folder(input_dir), fqn_to_index_mapping)
        nbytes = [_nbytes(source, names) for names in files.values()]
        place = pack(np.array(nbytes, dtype=np.int64), session.size).tolist()
        mine = [file for file, rank in zip(files, place, strict=True) if rank == session.rank]
        session.phase("write")
        _write(source, output, {file: files[file] for file in mine}, num_threads)
        session.gather(b"")
        session.phase("commit")
        if session.rank == 0:
            _publish(source, output, files)


def consolidate(
    source: Folder, output: Folder, mapping: Mapping[str, int], threads: int
) -> list[str]:
    """Consolidate the files of a folder, and return the names of the new files."""
    opened, files = _open(source, mapping)
    _write(opened, output, files, threads)
    _publish(opened, output, files)
    return list(files)


def _open(folder: Folder, mapping: Mapping[str, int]) -> tuple[CheckpointReader, _Files]:
    """Return a reader of the input, and the tensors of each output file."""
    if not mapping:
        raise ValueError("fqn_to_index_mapping is empty: it must number the file of each tensor")
    source = open_folder(folder.store, listed=False)
    source.check_coverage()
    left = [name for name in source if name not in mapping]
    if left:
        raise ValueError(f"fqn_to_index_mapping lacks {len(left)} tensors: {_first_names(left)}")
    absent = [name for name in mapping if name not in source]
    if absent:
        warn(
            f"{len(absent)} tensors of the mapping are in no file: {_first_names(absent)}",
            stacklevel=4,
        )
    last = max(mapping.values())
    files: _Files = {}
    for name, number in mapping.items():
        if name in source:
            files.setdefault(file_name(number, last), []).append(name)
    return source, files


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMES_SHOWN]) + (", ..." if len(names) > _MAX_NAMES_SHOWN else "")


def _nbytes(source: CheckpointReader, names: Sequence[str]) -> int:
    described = (source.dtype_and_shape(name) for name in names)
    return sum(prod(shape) * dtype.itemsize for dtype, shape in described)


def _publish(source: CheckpointReader, output: Folder, files: _Files) -> None:
    weights = {name: file for file, names in files.items() for name in names}
    output.store.put(INDEX, listing(weights, _nbytes(source, list(weights))), mode="replace")


def _write(source: CheckpointReader, output: Folder, files: _Files, threads: int) -> None:
    together = max(1, min(threads, len(files)))
    readers = max(1, settings.read_threads() // together)
    budget = MemoryBudget.of(None).shared_by(together)
    content = {file: _content(source, names, readers, budget) for file, names in files.items()}
    output.write(content, threads, budget.slab_window_bytes())


def _content(
    source: CheckpointReader, names: Sequence[str], readers: int, budget: MemoryBudget
) -> FileContent:
    """Return a file as its header and slabs, which are read when they are written."""
    laid_out = layout({name: source.dtype_and_shape(name) for name in names}, of_wholes())
    slabs = list(_slabs(source, laid_out.names, min(_MAX_SLAB_BYTES, budget.slab_bytes())))
    nbytes = np.array([len(laid_out.header), *(nbytes for _, nbytes in slabs)], np.int64)
    payloads = _SlabPayloads(laid_out.header, source, slabs, readers, budget.slab_read_bytes())
    return FileContent(np.arange(len(nbytes)), nbytes, payloads)


class _SlabPayloads(Payloads):
    """The header of a file and its slabs, of which only the latest is in memory.

    They must be copied one after the other, by one thread.
    """

    def __init__(
        self,
        header: bytes,
        source: CheckpointReader,
        slabs: Sequence[tuple[_Slab, int]],
        readers: int,
        budget: int,
    ) -> None:
        self.addresses = np.zeros(len(slabs) + 1, np.int64)
        self._source, self._slabs, self._readers, self._budget = source, slabs, readers, budget
        self._row, self._data = 0, np.frombuffer(header, np.uint8)

    def copy(self, row: int, start: int, nbytes: int, address: int) -> None:
        if row != self._row:
            self._data = np.zeros(0, np.uint8)  # first, or two slabs would be in memory
            slab, size = self._slabs[row - 1]
            self._data = _read(self._source, slab, size, self._readers, self._budget)
            self._row = row
        copy_memory(address, self._data.ctypes.data + start, nbytes)


_Slab = list[tuple[str, Box]]
"""Boxes of tensors whose bytes are adjacent in the file."""


def _slabs(
    source: CheckpointReader, names: Sequence[str], most: int
) -> Iterator[tuple[_Slab, int]]:
    """Yield slabs of at most `most` bytes: several small tensors, or part of a large one."""
    slab: _Slab = []
    size = 0
    for name in names:
        dtype, shape = source.dtype_and_shape(name)
        for box in _pieces(shape, max(1, most // dtype.itemsize)):
            nbytes = box.numel * dtype.itemsize
            if slab and size + nbytes > most:
                yield slab, size
                slab, size = [], 0
            slab.append((name, box))
            size += nbytes
    if slab:
        yield slab, size


def _pieces(shape: tuple[int, ...], most: int) -> Iterator[Box]:
    """Yield boxes of at most `most` elements that make up the tensor in C order."""
    if not prod(shape):
        return
    cut = 0  # All later dimensions are whole.
    while cut < len(shape) and prod(shape[cut + 1 :]) > most:
        cut += 1
    if cut == len(shape):
        yield Box.whole(shape)
        return
    rows = max(1, most // prod(shape[cut + 1 :]))
    inner = (0,) * (len(shape) - cut - 1)
    for outer in np.ndindex(shape[:cut]):
        for row in range(0, shape[cut], rows):
            sizes = (*(1,) * cut, min(rows, shape[cut] - row), *shape[cut + 1 :])
            yield Box((*outer, row, *inner), sizes)


def _read(
    source: CheckpointReader, slab: _Slab, nbytes: int, threads: int, budget: int
) -> NDArray[np.uint8]:
    space = np.empty(nbytes, dtype=np.uint8)
    requests = []
    at = 0
    for name, box in slab:
        dtype, _ = source.dtype_and_shape(name)
        into = np.ndarray(box.sizes, f"V{dtype.itemsize}", space.data, at)
        requests.append(Request(name, box, into))
        at += into.nbytes
    source.fill(requests, threads=threads, budget=budget)
    return space
