"""Memory that another process can map, and pickles of states whose tensors are stored in it."""

from __future__ import annotations

import io
import mmap
import os
import pickle
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from shardkeep.errors import Conflict
from shardkeep.torch_state.checkpointable import CheckpointableTensor, is_checkpointable
from shardkeep.torch_state.copies import copy_state, is_plain
from shardkeep.torch_state.pieces import describe_tensor, is_sharded
from shardkeep.torch_state.shards import Shards

__all__ = ["SharedMemory", "pack", "unpack"]

_MIN_BLOCK_BYTES = 1 << 30
"""Pages that are not used cost nothing, but each block costs a file descriptor, and many systems
allow a process 1,024 of them."""
_ALIGNMENT_BYTES = 64
_SHARD_ATTRIBUTES = tuple(CheckpointableTensor.__annotations__)


class SharedMemory:
    """Memory for the tensors of one state, in blocks that other processes can map.

    Attributes:
        files: the file descriptor of each block.
        close: closes the descriptors; called when the object is collected, too.
    """

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []
        self._used = 0
        self.files: list[int] = []
        self.close = weakref.finalize(self, _close, self.files)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return `nbytes` bytes of memory as a tensor of uint8."""
        if not self._blocks or self._used + nbytes > self._blocks[-1].numel():
            self._grow(max(_MIN_BLOCK_BYTES, nbytes))
        memory = self._blocks[-1][self._used : self._used + nbytes]
        self._used += -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return memory

    def find(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """Return the number of the block that holds a tensor and the tensor's offset in it.

        Returns None if the tensor's memory is not in any of the blocks.
        """
        for number, block in enumerate(self._blocks):
            offset = tensor.data_ptr() - block.data_ptr()
            if 0 <= offset < block.numel():
                return number, offset
        return None

    def _grow(self, nbytes: int) -> None:
        file = _anonymous_file()
        self.files.append(file)
        os.truncate(file, nbytes)
        self._blocks.append(_mapped(file))
        self._used = 0


def _anonymous_file() -> int:
    # Linux. A write to a full /dev/shm, which is often small, would kill the process.
    if hasattr(os, "memfd_create"):
        return os.memfd_create("shardkeep")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _mapped(file: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(file, 0), dtype=torch.uint8)


def _close(files: list[int]) -> None:
    while files:
        os.close(files.pop())


def pack(value: Any, memory: SharedMemory, *, as_shards: bool) -> bytes:
    """Return the pickle of a value whose tensors are stored in shared memory.

    Args:
        value: any picklable value.
        memory: where the tensors are. Those that are elsewhere are copied to it.
        as_shards: whether to pickle sharded tensors as `Shards`, which need no process group.
    """
    stream = io.BytesIO()
    _Pickler(stream, memory, as_shards).dump(value)
    return stream.getvalue()


def unpack(data: bytes, files: Sequence[int]) -> Any:
    """Return a value that was packed.

    Args:
        data: the pickle.
        files: descriptors of the blocks of its memory; they may be closed afterwards.
    """
    return _Unpickler(io.BytesIO(data), [_mapped(file) for file in files]).load()


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, memory: SharedMemory, as_shards: bool) -> None:
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self._memory, self._as_shards = memory, as_shards
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def persistent_id(self, value: Any) -> Any:
        if type(value) is not torch.Tensor or not is_plain(value):
            return None
        shard = {
            name: getattr(value, name) for name in _SHARD_ATTRIBUTES if is_checkpointable(value)
        }
        tensor = value.detach()
        if tensor.numel() and self._memory.find(tensor) is None:
            _, tensor = self._copies.setdefault(
                id(value), (value, copy_state(tensor, allocate=self._memory.allocate))
            )
        found = self._memory.find(tensor) if tensor.numel() else None
        return found, tensor.dtype, tuple(tensor.shape), tensor.stride(), shard

    def reducer_override(self, value: Any) -> Any:
        if self._as_shards and is_sharded(value) and not isinstance(value, Shards):
            try:
                (described,) = describe_tensor("", value)
            except Conflict:  # Raised again where the tensor's name is known.
                return NotImplemented
            parts = [(piece.box, piece.local) for piece in described.pieces]
            return Shards, (described.shape, parts, value.dtype)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, blocks: list[torch.Tensor]) -> None:
        super().__init__(stream)
        self._blocks = blocks

    def persistent_load(self, pid: Any) -> Any:
        found, dtype, shape, strides, shard = pid
        if found is None:
            made = torch.empty(shape, dtype=dtype)
        else:
            number, offset = found
            block = self._blocks[number][offset:]
            elements = block[: block.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
            made = elements.as_strided(shape, strides, elements.storage_offset())
        vars(made).update(shard)
        return made
