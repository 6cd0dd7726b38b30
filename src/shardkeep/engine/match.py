"""Comparison of a template with a checkpoint: names, shapes and dtypes, all at once."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shardkeep.checkpoint.reader import CheckpointReader
from shardkeep.plan.overlap import Boxes
from shardkeep.state.flatten import Flat, Leaf
from shardkeep.state.per_rank import PerRankValues
from shardkeep.torch_state.columns import PieceColumns
from shardkeep.torch_state.describe import describe_tensors
from shardkeep.torch_state.objects import TORCH_MAKERS, from_bytes
from shardkeep.torch_state.pieces import TensorDescription
from shardkeep.types import DTYPES, I64, Path, Tensors

__all__ = ["Contents", "Match", "MatchedPieces", "match"]


class Contents:
    """The contents of a checkpoint with torch's types.

    Args:
        source: the checkpoint.
        trust: classes that objects may contain.
    """

    def __init__(self, source: CheckpointReader, trust: tuple[str, ...]) -> None:
        self.source = source
        self._trust = trust
        self._values: dict[str, Any] = {}

    def is_tensor(self, name: str) -> bool:
        return name in self.source.dtypes_and_shapes

    def value(self, name: str) -> Any:
        """Return an object with torch's types. It is read once."""
        if name not in self._values:
            decode = partial(from_bytes, name=name, trust=self._trust)
            self._values[name] = self.source.value(name, makers=TORCH_MAKERS, decode=decode)
        return self._values[name]

    def tensor_from_item(self, name: str) -> Any:
        """Return a tensor of one chunk as its item describes it, with scale and zero point."""
        item = self.source.item_bytes(name)
        with self.source.name_errors(name):
            return from_bytes(item, name=name, trust=self._trust)

    def find(self, name: str, path: Path) -> tuple[str, Any] | None:
        """Return the name of the object that contains the value at `path`, and that value.

        The object has the name itself, or it is a container around the path: torch 2.3 and states
        that are not flattened store whole containers. None if there is no such object.
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
    """Return the value at a path inside a value, in a tuple as it may be None; None without one."""
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
class MatchedPieces:
    """The pieces of tensors that the checkpoint stores as tensors of the same names and shapes.

    Attributes:
        names: the names of the tensors, in the order of the template.
        wanted: [P] the boxes of the pieces; tensors are numbered as in the checkpoint.
        tensor: [P] the position in `names` of the piece's tensor.
        memory: [P] where the piece is put.
        addresses: [P] the address of that memory if it is contiguous and has the stored dtype;
            otherwise 0.
    """

    names: list[str]
    wanted: Boxes
    tensor: I64
    memory: Sequence[torch.Tensor]
    addresses: I64

    def names_of(self, pieces: NDArray[np.bool_]) -> tuple[str, ...]:
        """Return the names of the tensors of these pieces, each once."""
        return tuple(self.names[row] for row in dict.fromkeys(self.tensor[pieces].tolist()))


@dataclass(frozen=True, slots=True)
class Match:
    """What a template and a checkpoint have in common, and where they differ.

    Attributes:
        path: the path of the checkpoint.
        pieces: the tensors that both have as tensors.
        inside_objects: tensors that the checkpoint has inside an object, and their stored values.
        values: all other leaves that both have, and their stored values.
        missing: names that only the template has.
        unexpected: names that only the checkpoint has.
        dtypes: name -> (stored dtype, wanted dtype), where these differ.
        refused: name -> why it cannot be loaded.
    """

    path: str
    pieces: MatchedPieces
    inside_objects: list[tuple[TensorDescription, torch.Tensor]] = field(default_factory=list)
    values: list[tuple[Leaf, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    dtypes: dict[str, tuple[str, str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def match(flat: Flat, contents: Contents, per_rank: PerRankValues) -> Match:
    """Compare names, shapes and dtypes. Only objects are read.

    Args:
        flat: the template.
        contents: the checkpoint.
        per_rank: the `PerRank` values of this rank.
    """
    source, known = contents.source, contents.source.index
    rows, objects, _ = describe_tensors(flat)
    names, tensors = rows.names, rows.tensors()
    pieces, stored_row = rows.pieces(tensors), source.rows(names)
    stored = np.flatnonzero(stored_row >= 0)
    same_shape = _same_shape(tensors, stored, known.tensors, stored_row[stored])
    cast = np.zeros(len(names), dtype=np.bool_)
    cast[stored] = tensors.dtype[stored] != known.tensors.dtype[stored_row[stored]]
    dims = known.chunks.offsets.shape[1]
    matching = _matched_pieces(names, pieces, stored[same_shape], stored_row, cast, dims)
    matched = Match(source.url, matching, refused=dict(per_rank.refused))
    for row in stored[~same_shape].tolist():
        shape = source.dtypes_and_shapes[names[row]][1]
        matched.refused[names[row]] = _shapes_differ(shape, rows.shapes[row])
    for row in stored[same_shape & cast[stored]].tolist():
        dtypes = known.tensors.dtype[stored_row[row]], tensors.dtype[row]
        matched.dtypes[names[row]] = (DTYPES[dtypes[0]].name, DTYPES[dtypes[1]].name)
    used = {names[row] for row in stored.tolist()}
    for row in np.flatnonzero(stored_row < 0).tolist():
        dtype, shape = DTYPES[tensors.dtype[row]], tuple(rows.shapes[row])
        tensor = TensorDescription(names[row], dtype, shape, pieces.of(row, len(shape)))
        path = flat.structure.leaves.get(tensor.name, ())
        used |= _match_inside_object(matched, tensor, path, contents)
    if objects:
        used |= _match_objects(matched, flat, objects, contents)
    unused = (name for name in source if name not in used)
    matched.unexpected.extend(name for name in unused if not per_rank.contains(name))
    return matched


def _match_objects(
    matched: Match, flat: Flat, objects: Container[str], contents: Contents
) -> set[str]:
    """Match the leaves that are not tensors, and return the names in the checkpoint they use."""
    used = set()
    for leaf in flat.leaves:
        if leaf.name not in objects:
            continue
        if contents.is_tensor(leaf.name):
            used.add(leaf.name)
            _match_quantized(matched, leaf, contents)
        elif (found := contents.find(leaf.name, leaf.path)) is None:
            matched.missing.append(leaf.name)
        else:
            used.add(found[0])
            matched.values.append((leaf, found[1]))
    return used


def _shapes_differ(stored: Sequence[int], wanted: Sequence[int]) -> str:
    return f"shape: {list(stored)} in the checkpoint, {list(wanted)} in the template"


def _match_quantized(matched: Match, leaf: Leaf, contents: Contents) -> None:
    """Match a leaf that is a tensor only in the checkpoint: a quantized one, or another value.

    Only the item of a quantized tensor has its scale.
    """
    wanted = leaf.value
    if isinstance(wanted, torch.Tensor) and wanted.is_quantized:
        dtype, shape = contents.source.dtype_and_shape(leaf.name)
        if (f"torch.{dtype}", shape) == (str(wanted.dtype), tuple(wanted.shape)):
            matched.values.append((leaf, contents.tensor_from_item(leaf.name)))
            return
        stored, kind = f"{dtype}{list(shape)}", f"{wanted.dtype}{list(wanted.shape)}"
    else:
        stored, kind = "a tensor", type(wanted).__name__
    matched.refused[leaf.name] = f"kind: {stored} in the checkpoint, {kind} in the template"


def _same_shape(ours: Tensors, mine: I64, theirs: Tensors, place: I64) -> NDArray[np.bool_]:
    """Whether rows of two tables of tensors have the same shape, pair by pair."""
    dims = max(ours.shape.shape[1], theirs.shape.shape[1])
    shapes = _widened(ours.shape[mine], dims, 1) == _widened(theirs.shape[place], dims, 1)
    same: NDArray[np.bool_] = shapes.all(axis=1) & (ours.ndim[mine] == theirs.ndim[place])
    return same


def _matched_pieces(
    names: Sequence[str],
    pieces: PieceColumns,
    tensors: I64,
    stored_row: I64,
    cast: NDArray[np.bool_],
    dims: int,
) -> MatchedPieces:
    """Return the pieces of some tensors.

    Args:
        names: the names of all tensors of the template.
        pieces: the pieces of all of them.
        tensors: the tensors, by their positions in `names`.
        stored_row: the row of each tensor of the template in the checkpoint.
        cast: whether the dtype of a tensor differs.
        dims: the number of columns of the checkpoint's coordinates.
    """
    chosen = np.flatnonzero(np.bincount(tensors, minlength=len(names))[pieces.piece])
    of = pieces.piece[chosen]
    wanted = Boxes(
        stored_row[of],
        _widened(pieces.offsets[chosen], dims, 0),
        _widened(pieces.sizes[chosen], dims, 1),
    )
    memory = [pieces.memory[row] for row in chosen.tolist()]
    mine = [names[row] for row in tensors.tolist()]
    addresses = np.where(cast[of], 0, pieces.addresses[chosen])
    return MatchedPieces(mine, wanted, np.searchsorted(tensors, of), memory, addresses)


def _widened(table: I64, dims: int, fill: int) -> I64:
    """Return a table of coordinates with `dims` columns; cut columns contain only `fill`."""
    more = dims - table.shape[1]
    return np.pad(table, ((0, 0), (0, more)), constant_values=fill) if more > 0 else table[:, :dims]


def _match_inside_object(
    matched: Match, tensor: TensorDescription, path: Path, contents: Contents
) -> set[str]:
    """Match a tensor that the checkpoint has inside an object, and return the object's name."""
    found = contents.find(tensor.name, path)
    if found is None:
        matched.missing.append(tensor.name)
        return set()
    name, value = found
    if not isinstance(value, torch.Tensor):
        kind = type(value).__name__
        matched.refused[tensor.name] = f"kind: {kind} in the checkpoint, a tensor in the template"
    elif tuple(value.shape) != tensor.shape:
        matched.refused[tensor.name] = _shapes_differ(value.shape, tensor.shape)
    else:
        stored = str(value.dtype).removeprefix("torch.")
        if stored != tensor.dtype.name:
            matched.dtypes[tensor.name] = (stored, tensor.dtype.name)
        matched.inside_objects.append((tensor, value))
    return {name}
