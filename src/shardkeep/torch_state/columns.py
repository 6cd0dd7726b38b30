"""The tensors of a state and their pieces on this rank, as columns of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch

from shardkeep.plan.cutting import cut
from shardkeep.torch_state.memory import is_contiguous_on_cpu
from shardkeep.torch_state.pieces import TensorDescription, TensorPiece
from shardkeep.types import DTYPES, I64, ITEMSIZES, Box, Tensors

__all__ = ["ColumnsBuilder", "PieceColumns", "aliases", "cut_large"]


@dataclass(frozen=True, slots=True, eq=False)
class PieceColumns:
    """P pieces as columns, in the order of their tensors.

    Attributes:
        piece: [P] the row of the tensor that each piece belongs to.
        offsets: [P, D] the offsets of each piece in its global tensor.
        sizes: [P, D] the sizes of each piece.
        memory: the P pieces in memory.
        pointers: [P] the address of each piece's first element, on any device.
        addresses: [P] the address of each piece that is in CPU memory in C order; 0 for the others.
    """

    piece: I64
    offsets: I64
    sizes: I64
    memory: Sequence[torch.Tensor]
    pointers: I64
    addresses: I64

    def of(self, tensor: int, ndim: int) -> tuple[TensorPiece, ...]:
        """Return the pieces of one tensor, which has `ndim` dimensions."""
        first, last = np.searchsorted(self.piece, [tensor, tensor + 1]).tolist()
        offsets, sizes = (t[first:last, :ndim].tolist() for t in (self.offsets, self.sizes))
        boxes = map(Box, map(tuple, offsets), map(tuple, sizes))
        return tuple(map(TensorPiece, boxes, self.memory[first:last]))


@dataclass(slots=True)
class ColumnsBuilder:
    """Collects tensors and their pieces, and makes columns of them.

    Attributes:
        names, codes, shapes: name, dtype code and global shape of each tensor.
        counts: row of a tensor -> its number of pieces, if it is not one.
        memory: the pieces.
        pointers: the address of the first element of each piece.
        apart: rows of the pieces that are not in CPU memory in C order.
        boxes: row of a piece -> its box, if it is not the whole tensor.
    """

    names: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    shapes: list[Sequence[int]] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)
    memory: list[torch.Tensor] = field(default_factory=list)
    pointers: list[int] = field(default_factory=list)
    apart: list[int] = field(default_factory=list)
    boxes: dict[int, Box] = field(default_factory=dict)

    def add(self, described: TensorDescription) -> None:
        if len(described.pieces) != 1:
            self.counts[len(self.names)] = len(described.pieces)
        self.names.append(described.name)
        self.codes.append(described.dtype.code)
        self.shapes.append(described.shape)
        for piece in described.pieces:
            self.boxes[len(self.memory)] = piece.box
            if not is_contiguous_on_cpu(piece.local):
                self.apart.append(len(self.memory))
            self.memory.append(piece.local)
            self.pointers.append(piece.local.data_ptr() if piece.local.numel() else 0)

    def tensors(self) -> Tensors:
        ndim = np.fromiter(map(len, self.shapes), np.int64, len(self.shapes))
        shape = np.ones((len(ndim), int(ndim.max(initial=0))), dtype=np.int64)
        inside = np.arange(shape.shape[1]) < ndim[:, None]
        shape[inside] = np.fromiter(chain.from_iterable(self.shapes), np.int64, int(ndim.sum()))
        codes = np.array(self.codes, dtype=np.uint8)
        return Tensors(tuple(self.names), codes, ndim.astype(np.uint8), shape)

    def pieces(self, tensors: Tensors) -> PieceColumns:
        counts = np.ones(len(self.names), dtype=np.int64)
        counts[list(self.counts)] = list(self.counts.values())
        piece = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        sizes = tensors.shape[piece]
        offsets = np.zeros_like(sizes)
        for row, box in self.boxes.items():
            offsets[row, : box.ndim], sizes[row, : box.ndim] = box.offsets, box.sizes
        pointers = np.array(self.pointers, dtype=np.uint64).view(np.int64)
        addresses = pointers.copy()
        addresses[self.apart] = 0
        return PieceColumns(piece, offsets, sizes, self.memory, pointers, addresses)


def cut_large(tensors: Tensors, whole: PieceColumns, limit: int) -> PieceColumns:
    """Return the pieces with those of more than `limit` bytes cut into views of their memory."""
    nbytes = whole.sizes.prod(axis=1) * ITEMSIZES[tensors.dtype[whole.piece]]
    large = np.flatnonzero(nbytes > limit)
    if not len(large):
        return whole
    counts = np.ones(len(nbytes), dtype=np.int64)
    boxes, views, done = list[Box](), list[torch.Tensor](), 0
    for row in large.tolist():
        tensor = whole.piece[row]
        ndim = int(tensors.ndim[tensor])
        outer = Box(
            tuple(whole.offsets[row, :ndim].tolist()), tuple(whole.sizes[row, :ndim].tolist())
        )
        parts = cut(outer, DTYPES[tensors.dtype[tensor]].itemsize, limit)
        local = whole.memory[row].detach()
        views += whole.memory[done:row]
        views += [local[part.relative_to(outer).slices] for part in parts]
        boxes += parts
        counts[row], done = len(parts), row + 1
    views += whole.memory[done:]
    offsets, sizes = (np.repeat(t, counts, axis=0) for t in (whole.offsets, whole.sizes))
    pointers, addresses = (np.repeat(t, counts) for t in (whole.pointers, whole.addresses))
    changed = np.flatnonzero(np.repeat(np.isin(np.arange(len(counts)), large), counts))
    for row, box in zip(changed.tolist(), boxes, strict=True):
        offsets[row, : box.ndim], sizes[row, : box.ndim] = box.offsets, box.sizes
        pointers[row] = np.uint64(views[row].data_ptr()).view(np.int64)
        addresses[row] = pointers[row] if is_contiguous_on_cpu(views[row]) else 0
    return PieceColumns(np.repeat(whole.piece, counts), offsets, sizes, views, pointers, addresses)


def aliases(tensors: Tensors, pieces: PieceColumns) -> I64:
    """Return for each piece the row of the first piece that is the same: tied weights.

    The same means the same storage, offset, shape, strides and dtype, and the same box of the same
    global shape. Without another one, it is the piece's own row. Empty pieces share no memory.
    """
    alias = np.arange(len(pieces.piece), dtype=np.int64)
    # Only pieces that begin at the same address can be the same. There are few of them.
    order = np.argsort(pieces.pointers, kind="stable")
    again = np.diff(pieces.pointers[order]) == 0
    shared = np.zeros(len(alias), dtype=np.bool_)
    shared[order[1:][again]] = shared[order[:-1][again]] = True
    first: dict[Any, int] = {}
    for row in np.flatnonzero(shared & (pieces.sizes > 0).all(axis=1)).tolist():
        tensor = int(pieces.piece[row])
        boxes = (*pieces.offsets[row].tolist(), *pieces.sizes[row].tolist())
        kind = (int(tensors.dtype[tensor]), int(tensors.ndim[tensor]))
        identity = (kind, tuple(tensors.shape[tensor].tolist()), boxes)
        alias[row] = first.setdefault((_memory_identity(pieces.memory[row]), identity), row)
    return alias


def _memory_identity(memory: torch.Tensor) -> Any:
    """Return a key that tensors of one shape share if they have the same elements in memory."""
    steps = tuple(
        0 if size == 1 else step for size, step in zip(memory.shape, memory.stride(), strict=True)
    )
    return memory.device, memory.data_ptr(), steps, memory.is_conj(), memory.is_neg()
