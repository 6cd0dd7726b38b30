"""Sharded safetensors files into whole ones, in slabs: no tensor needs to fit into memory."""

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
"""Bytes that a thread reads at a time of what it joins, at most."""

_SHOWN = 5

_Files = dict[str, list[str]]
"""File -> the tensors that it is to hold."""


def consolidate_safetensors_files(
    input_dir: str,
    output_dir: str,
    fqn_to_index_mapping: dict[str, int],
    num_threads: int = 1,
) -> None:
    """Join the files that ranks wrote (`DCP_SHARDING_INFO`) to files of whole tensors.

    They have the names of Hugging Face's sets, and appear when they are complete; the index comes
    last. Nothing is removed.

    Args:
        input_dir, output_dir: folders, or URLs that fsspec knows.
        fqn_to_index_mapping: tensor -> number of the file that it goes to, from 1 on.
        num_threads: files that are written at a time; all of them share
            `SHARDKEEP_MAX_HOST_MEMORY_BYTES`.

    Raises:
        NotACheckpoint: there is nothing to join.
        FormatError: a part is missing, or files contradict each other or are broken.
        ValueError: the mapping is empty, or lacks a tensor; nothing was written.
    """
    consolidate(Folder(input_dir), Folder(output_dir), fqn_to_index_mapping, num_threads)


def consolidate_safetensors_files_on_every_rank(
    input_dir: str,
    output_dir: str,
    fqn_to_index_mapping: dict[str, int],
    num_threads: int = 1,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """The same by all ranks of a group: they share the files out, even in bytes.

    No collective is called. Raises RankFailed, too: another rank failed, and there is no index.
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
    """Join the files of one folder to files in another; their names. Raises as the above."""
    opened, files = _open(source, mapping)
    _write(opened, output, files, threads)
    _publish(opened, output, files)
    return list(files)


def _open(folder: Folder, mapping: Mapping[str, int]) -> tuple[CheckpointReader, _Files]:
    """What is there to be joined, and what goes to which file."""
    if not mapping:
        raise ValueError("fqn_to_index_mapping is empty: no tensor has a file to go to")
    source = open_folder(folder.store, listed=False)
    source.check_coverage()
    left = [name for name in source if name not in mapping]
    if left:
        raise ValueError(f"fqn_to_index_mapping lacks {len(left)} tensors: {_some(left)}")
    absent = [name for name in mapping if name not in source]
    if absent:
        warn(f"{len(absent)} tensors of the mapping are nowhere: {_some(absent)}", stacklevel=4)
    last = max(mapping.values())
    files: _Files = {}
    for name, number in mapping.items():
        if name in source:
            files.setdefault(file_name(number, last), []).append(name)
    return source, files


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


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
    """The header of a file, and slabs of which the last one asked for is in memory.

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
            self._data = np.zeros(0, np.uint8)  # first, or two slabs would take memory
            slab, size = self._slabs[row - 1]
            self._data = _read(self._source, slab, size, self._readers, self._budget)
            self._row = row
        copy_memory(address, self._data.ctypes.data + start, nbytes)


_Slab = list[tuple[str, Box]]
"""Boxes of tensors: their bytes follow each other in the file."""


def _slabs(
    source: CheckpointReader, names: Sequence[str], most: int
) -> Iterator[tuple[_Slab, int]]:
    """Small tensors together, large ones in pieces, of so many bytes at most."""
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
    """Boxes of at most so many elements that, one after the other, are the tensor in C order."""
    if not prod(shape):
        return
    cut = 0  # Dimensions from here on are whole, apart from this one.
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
