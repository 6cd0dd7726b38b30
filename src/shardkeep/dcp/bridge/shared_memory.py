"""Memory that another process can map, and states that lie in it."""

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

__all__ = ["Blocks", "pack", "unpack"]

_BLOCK = 1 << 30
"""Bytes of a block at least. What is not used of it costs nothing; each block costs a descriptor,
and many systems allow 1,024 of them."""
_ALIGNMENT = 64
_PLACE = tuple(CheckpointableTensor.__annotations__)


class Blocks:
    """Memory for the tensors of one state; give it up with `close`."""

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []
        self._used = 0
        self.files: list[int] = []
        """Descriptors, one for each block."""
        self.close = weakref.finalize(self, _close, self.files)

    def take(self, nbytes: int) -> torch.Tensor:
        """So many bytes, as a tensor of uint8."""
        if not self._blocks or self._used + nbytes > self._blocks[-1].numel():
            self._grow(max(_BLOCK, nbytes))
        taken = self._blocks[-1][self._used : self._used + nbytes]
        self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return taken

    def find(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """In which block its memory lies, and from which byte on; None if elsewhere."""
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
    if hasattr(os, "memfd_create"):  # Linux; /dev/shm is often too small, and then a write kills.
        return os.memfd_create("shardkeep")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _mapped(file: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(file, 0), dtype=torch.uint8)


def _close(files: list[int]) -> None:
    while files:
        os.close(files.pop())


def pack(value: Any, blocks: Blocks, *, as_shards: bool) -> bytes:
    """Anything, pickled, with its tensors in the blocks: those that are not there are copied.

    Args:
        as_shards: put what belongs to several ranks as `Shards`, which need no process group.
    """
    stream = io.BytesIO()
    _Pickler(stream, blocks, as_shards).dump(value)
    return stream.getvalue()


def unpack(data: bytes, files: Sequence[int]) -> Any:
    """What was packed, from the descriptors of its blocks; they may be closed afterwards."""
    return _Unpickler(io.BytesIO(data), [_mapped(file) for file in files]).load()


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, blocks: Blocks, as_shards: bool) -> None:
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self._blocks, self._as_shards = blocks, as_shards
        self._moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def persistent_id(self, value: Any) -> Any:
        if type(value) is not torch.Tensor or not is_plain(value):
            return None
        place = {name: getattr(value, name) for name in _PLACE if is_checkpointable(value)}
        tensor = value.detach()
        if tensor.numel() and self._blocks.find(tensor) is None:
            _, tensor = self._moved.setdefault(
                id(value), (value, copy_state(tensor, allocate=self._blocks.take))
            )
        found = self._blocks.find(tensor) if tensor.numel() else None
        return found, tensor.dtype, tuple(tensor.shape), tensor.stride(), place

    def reducer_override(self, value: Any) -> Any:
        if self._as_shards and is_sharded(value) and not isinstance(value, Shards):
            try:
                (described,) = describe_tensor("", value)
            except Conflict:  # It is told where the tensor's name is known.
                return NotImplemented
            parts = [(piece.box, piece.local) for piece in described.pieces]
            return Shards, (described.shape, parts, value.dtype)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, blocks: list[torch.Tensor]) -> None:
        super().__init__(stream)
        self._blocks = blocks

    def persistent_load(self, pid: Any) -> Any:
        found, dtype, shape, strides, place = pid
        if found is None:
            made = torch.empty(shape, dtype=dtype)
        else:
            number, offset = found
            rest = self._blocks[number][offset:]
            whole = rest[: rest.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
            made = whole.as_strided(shape, strides, whole.storage_offset())
        vars(made).update(place)
        return made
