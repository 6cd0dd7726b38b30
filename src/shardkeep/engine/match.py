"""How a template and a checkpoint go together: names, shapes and dtypes, all compared at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shardkeep.checkpoint.reader import CheckpointReader
from shardkeep.plan.overlap import Boxes
from shardkeep.state.flatten import Flat, Leaf
from shardkeep.state.per_rank import OwnValues
from shardkeep.torch_state.columns import PieceColumns
from shardkeep.torch_state.describe import describe_tensors
from shardkeep.torch_state.objects import TORCH_MAKERS, from_bytes
from shardkeep.torch_state.pieces import TensorDescription
from shardkeep.types import DTYPES, I64, Path, Tensors

__all__ = ["Contents", "Found", "Match", "match"]


class Contents:
    """A checkpoint's contents as a template sees them: tensors, and values made for torch."""

    def __init__(self, source: CheckpointReader, trust: tuple[str, ...]) -> None:
        self.source = source
        self._trust = trust
        self._values: dict[str, Any] = {}

    def is_tensor(self, name: str) -> bool:
        return name in self.source.dtypes_and_shapes

    def value(self, name: str) -> Any:
        """An object, with torch's own types."""
        if name not in self._values:
            decode = partial(from_bytes, name=name, trust=self._trust)
            self._values[name] = self.source.value(name, makers=TORCH_MAKERS, decode=decode)
        return self._values[name]

    def whole(self, name: str) -> Any:
        """A tensor that is one chunk, as its item describes it."""
        item = self.source.item_bytes(name)
        with self.source.name_errors(name):
            return from_bytes(item, name=name, trust=self._trust)

    def find(self, name: str, path: Path) -> tuple[str, Any] | None:
        """The object that holds what a template has at `path`, and the value there.

        It is either an object of that very name or, as torch 2.3 and unflattened states have it,
        part of an object that is one of the containers around it.
        """
        if name in self.source and not self.source.is_tensor(name):
            return name, self.value(name)
        for depth in range(len(path) - 1, 0, -1):
            outer = ".".join(map(str, path[:depth]))
            if outer in self.source and not self.source.is_tensor(outer):
                found = _descend(self.value(outer), path[depth:])
                return None if found is None else (outer, found[0])
        return None


def _descend(value: Any, path: Path) -> tuple[Any] | None:
    """The value at a path inside a value, in a 1-tuple (as it may be None), or None."""
    for key in path:
        if isinstance(value, Mapping):
            # torch 2.4 and later turn all keys into strings on saving.
            same = [k for k in (key, str(key)) if k in value]
            same = same or [k for k in value if str(k) == str(key)]
            if not same:
                return None
            value = value[same[0]]
        elif isinstance(value, list | tuple) and isinstance(key, int) and 0 <= key < len(value):
            value = value[key]
        else:
            return None
    return (value,)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Pieces of tensors that the checkpoint has as such, under the same names and shapes.

    Attributes:
        names: of the tensors, in the order of the template.
        wanted: [P] the pieces; tensors count as in the checkpoint.
        of: [P] which of `names` a piece belongs to.
        memory: [P] where it goes.
        addresses: [P] where that lies in order, as elements of the stored dtype; else 0.
    """

    names: list[str]
    wanted: Boxes
    of: I64
    memory: Sequence[torch.Tensor]
    addresses: I64

    def names_of(self, pieces: NDArray[np.bool_]) -> tuple[str, ...]:
        """The names of these pieces' tensors, each once."""
        return tuple(self.names[row] for row in dict.fromkeys(self.of[pieces].tolist()))


@dataclass(frozen=True, slots=True)
class Match:
    """How a template and a checkpoint go together."""

    path: str
    found: Found
    inside: list[tuple[TensorDescription, torch.Tensor]]
    values: list[tuple[Leaf, Any]]
    missing: list[str]
    unexpected: list[str]
    dtypes: dict[str, tuple[str, str]]
    refused: dict[str, str]


def match(flat: Flat, contents: Contents, negotiate_writers: OwnValues) -> Match:
    """Compare names, shapes and dtypes; nothing is read but objects."""
    source, known = contents.source, contents.source.index
    rows, objects, _ = describe_tensors(flat)
    names, tensors = rows.names, rows.tensors()
    pieces, place = rows.pieces(tensors), source.rows(names)
    there = np.flatnonzero(place >= 0)
    same = _same_shape(tensors, there, known.tensors, place[there])
    cast = np.zeros(len(names), dtype=np.bool_)
    cast[there] = tensors.dtype[there] != known.tensors.dtype[place[there]]
    found = _found_pieces(names, pieces, there[same], place, cast, known.chunks.offsets.shape[1])
    matched = Match(source.url, found, [], [], [], [], {}, dict(negotiate_writers.refused))
    used = {names[row] for row in there.tolist()}
    for row in there[~same].tolist():
        shape = source.dtypes_and_shapes[names[row]][1]
        matched.refused[names[row]] = (
            f"shape: {list(shape)} in the checkpoint, {list(rows.shapes[row])} in the template"
        )
    for row in there[same & cast[there]].tolist():
        dtypes = known.tensors.dtype[place[row]], tensors.dtype[row]
        matched.dtypes[names[row]] = (DTYPES[dtypes[0]].name, DTYPES[dtypes[1]].name)
    for row in np.flatnonzero(place < 0).tolist():
        dtype, shape = DTYPES[tensors.dtype[row]], tuple(rows.shapes[row])
        tensor = TensorDescription(names[row], dtype, shape, pieces.of(row, len(shape)))
        path = flat.structure.leaves.get(tensor.name, ())
        used |= _match_inside(matched, tensor, path, contents)
    for leaf in (leaf for leaf in flat.leaves if leaf.name in objects) if objects else ():
        if contents.is_tensor(leaf.name):
            used.add(leaf.name)
            _match_quantized(matched, leaf, contents)
            continue
        held = contents.find(leaf.name, leaf.path)
        if held is None:
            matched.missing.append(leaf.name)
        else:
            used.add(held[0])
            matched.values.append((leaf, held[1]))
    left = (name for name in source if name not in used)
    matched.unexpected.extend(name for name in left if not negotiate_writers.others(name))
    return matched


def _match_quantized(matched: Match, leaf: Leaf, contents: Contents) -> None:
    """A tensor that is an object here: only its own item knows the scale of a quantized one."""
    wanted = leaf.value
    if isinstance(wanted, torch.Tensor) and wanted.is_quantized:
        dtype, shape = contents.source.dtype_and_shape(leaf.name)
        if (f"torch.{dtype}", shape) == (str(wanted.dtype), tuple(wanted.shape)):
            matched.values.append((leaf, contents.whole(leaf.name)))
            return
        stored, kind = f"{dtype}{list(shape)}", f"{wanted.dtype}{list(wanted.shape)}"
    else:
        stored, kind = "a tensor", type(wanted).__name__
    matched.refused[leaf.name] = f"kind: {stored} in the checkpoint, {kind} in the template"


def _same_shape(ours: Tensors, mine: I64, theirs: Tensors, place: I64) -> NDArray[np.bool_]:
    """Whether these rows of two tables of tensors have the same shape, pair by pair."""
    dims = max(ours.shape.shape[1], theirs.shape.shape[1])
    shapes = _widened(ours.shape[mine], dims, 1) == _widened(theirs.shape[place], dims, 1)
    same: NDArray[np.bool_] = shapes.all(axis=1) & (ours.ndim[mine] == theirs.ndim[place])
    return same


def _found_pieces(
    names: Sequence[str],
    pieces: PieceColumns,
    tensors: I64,
    place: I64,
    cast: NDArray[np.bool_],
    dims: int,
) -> Found:
    """The pieces of these tensors, whose places in the checkpoint are `place`; `cast`: those that
    have another dtype there.
    """
    chosen = np.flatnonzero(np.bincount(tensors, minlength=len(names))[pieces.piece])
    of = pieces.piece[chosen]
    wanted = Boxes(
        place[of],
        _widened(pieces.offsets[chosen], dims, 0),
        _widened(pieces.sizes[chosen], dims, 1),
    )
    memory = [pieces.memory[row] for row in chosen.tolist()]
    mine = [names[row] for row in tensors.tolist()]
    addresses = np.where(cast[of], 0, pieces.addresses[chosen])
    return Found(mine, wanted, np.searchsorted(tensors, of), memory, addresses)


def _widened(table: I64, dims: int, fill: int) -> I64:
    """A table of coordinates with so many columns; what is cut off holds nothing but `fill`."""
    more = dims - table.shape[1]
    return np.pad(table, ((0, 0), (0, more)), constant_values=fill) if more > 0 else table[:, :dims]


def _match_inside(
    matched: Match, tensor: TensorDescription, path: Path, contents: Contents
) -> set[str]:
    """A tensor that the checkpoint has inside an object; the object's name."""
    found = contents.find(tensor.name, path)
    if found is None:
        matched.missing.append(tensor.name)
        return set()
    name, value = found
    if not isinstance(value, torch.Tensor):
        kind = type(value).__name__
        matched.refused[tensor.name] = f"kind: {kind} in the checkpoint, a tensor in the template"
    elif tuple(value.shape) != tensor.shape:
        matched.refused[tensor.name] = (
            f"shape: {list(value.shape)} in the checkpoint, {list(tensor.shape)} in the template"
        )
    else:
        stored = str(value.dtype).removeprefix("torch.")
        if stored != tensor.dtype.name:
            matched.dtypes[tensor.name] = (stored, tensor.dtype.name)
        matched.inside.append((tensor, value))
    return {name}
