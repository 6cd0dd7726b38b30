"""A state as one rank sees it: its pieces in memory, its objects, and the claim that names them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardkeep.format import values
from shardkeep.tensors.pieces import (
    Described,
    Piece,
    aliases,
    describe_all,
    is_any_tensor,
    is_tensor,
)
from shardkeep.tensors.stateful import expand
from shardkeep.tree import Flat, Leaf, flatten
from shardkeep.types import Claim, Path, Structure, Tensors

__all__ = ["Local", "describe_state", "describe_tensors"]

_SMALL_VALUE = 16 * 1024
"""Values of up to this many characters of JSON stand in the manifest; larger ones in their item."""


@dataclass(frozen=True, slots=True, eq=False)
class Local:
    """What this rank holds of a state.

    Attributes:
        claim: names and boxes, for the other ranks.
        pieces: the memory of each piece, row by row as in the claim.
        objects: name -> value of objects and twins.
    """

    claim: Claim
    pieces: tuple[Piece, ...]
    objects: Mapping[str, Any]

    @property
    def memory(self):
        return [piece.local for piece in self.pieces]


def describe_state(state: Mapping[Any, Any], *, nested: bool = True) -> Local:
    """Flatten and describe; no tensor data moves.

    Args:
        state: what `save` is given.
        nested: False takes each top-level value as one leaf.

    Raises:
        Conflict: two things under one name, or something that can't be saved; it names it.
    """
    plain, _ = expand(state)
    flat = flatten(plain, is_any_tensor) if nested else _top_level(plain)
    tensors, objects = describe_tensors(flat)
    pieces = [piece for tensor in tensors for piece in tensor.pieces]
    width = max((len(tensor.shape) for tensor in tensors), default=0)
    offsets = np.zeros((len(pieces), width), dtype=np.int64)
    sizes = np.ones((len(pieces), width), dtype=np.int64)
    for row, piece in enumerate(pieces):
        offsets[row, : piece.box.ndim] = piece.box.offsets
        sizes[row, : piece.box.ndim] = piece.box.sizes
    counts = [len(tensor.pieces) for tensor in tensors]
    twins = {twin.name: twin.path for twin in flat.twins}
    return Local(
        claim=Claim(
            tensors=_columns(tensors, width),
            piece=np.repeat(np.arange(len(tensors), dtype=np.int64), counts),
            offsets=offsets,
            sizes=sizes,
            alias=np.array(aliases(pieces), dtype=np.int64),
            objects=tuple(objects),
            values=_small_values(objects),
            structure=_structure(flat, tensors),
            twins=twins,
        ),
        pieces=tuple(pieces),
        objects={**objects, **{twin.name: twin.value for twin in flat.twins}},
    )


def describe_tensors(flat: Flat) -> tuple[list[Described], dict[str, Any]]:
    """The tensors of a flat state, described, and its objects by name."""
    objects = {leaf.name: leaf.value for leaf in flat.leaves if not is_tensor(leaf.value)}
    tensors = ((leaf.name, leaf.value) for leaf in flat.leaves if leaf.name not in objects)
    return describe_all(tensors, taken=objects), objects


def _top_level(state: Mapping[Any, Any]) -> Flat:
    """Each value as it is; names and their collisions are those of any state with these keys."""
    shallow = flatten(dict.fromkeys(state, 0), is_any_tensor)
    leaves = tuple(Leaf(leaf.name, leaf.path, state[leaf.path[0]]) for leaf in shallow.leaves)
    return Flat(leaves, shallow.structure, ())


def _structure(flat: Flat, tensors: Sequence[Described]) -> Structure:
    """The state's structure, with the inner tensors of a subclass below where it stands."""
    leaves = flat.structure.leaves
    below: dict[str, list[str]] = {}
    for tensor in tensors:
        if tensor.name not in leaves:
            below.setdefault(_owner(tensor.name, leaves), []).append(tensor.name)
    if not below:
        return flat.structure
    paths: dict[str, Path] = {}
    containers = dict(flat.structure.containers)
    before = [0]  # how many leaves there are now before each of the old ones
    for name, path in leaves.items():
        for inner in below.get(name, [name]):
            rest = tuple(inner[len(name) + 1 :].split(".")) if inner != name else ()
            paths[inner] = path + rest
            containers |= {path + rest[:depth]: "dict" for depth in range(len(rest))}
        before.append(len(paths))
    empties = {path: before[count] for path, count in flat.structure.empties.items()}
    return Structure(paths, containers, empties)


def _owner(inner: str, leaves: Mapping[str, Path]) -> str:
    """The leaf that an inner tensor belongs to."""
    name = inner
    while name not in leaves:
        name = name.rpartition(".")[0]
    return name


def _columns(tensors: Sequence[Described], width: int) -> Tensors:
    shape = np.ones((len(tensors), width), dtype=np.int64)
    for row, tensor in enumerate(tensors):
        shape[row, : len(tensor.shape)] = tensor.shape
    return Tensors(
        names=tuple(tensor.name for tensor in tensors),
        dtype=np.array([tensor.dtype.code for tensor in tensors], dtype=np.uint8),
        ndim=np.array([len(tensor.shape) for tensor in tensors], dtype=np.uint8),
        shape=shape,
    )


def _small_values(objects: Mapping[str, Any]) -> dict[str, Any]:
    small = {}
    for name, value in objects.items():
        try:
            encoded = values.encode(value)
        except values.NotEncodable:
            continue
        if len(json.dumps(encoded)) <= _SMALL_VALUE:
            small[name] = encoded
    return small
