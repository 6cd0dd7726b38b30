"""A state as one rank sees it: its pieces in memory, its objects, and the claim that names them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardkeep.format import values
from shardkeep.tensors.pieces import Described, Piece, aliases, describe, is_tensor
from shardkeep.tensors.stateful import expand
from shardkeep.tree import Flat, flatten
from shardkeep.types import Claim, Tensors

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


def describe_state(state: Mapping[Any, Any]) -> Local:
    """Flatten and describe; no tensor data moves.

    Raises:
        Conflict: two things under one name, or something that can't be saved; it names it.
    """
    flat = flatten(expand(state).state, is_tensor)
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
            structure=flat.structure,
            twins=twins,
        ),
        pieces=tuple(pieces),
        objects={**objects, **{twin.name: twin.value for twin in flat.twins}},
    )


def describe_tensors(flat: Flat) -> tuple[list[Described], dict[str, Any]]:
    """The tensors of a flat state, described, and its objects by name."""
    tensors: list[Described] = []
    objects: dict[str, Any] = {}
    for leaf in flat.leaves:
        if is_tensor(leaf.value):
            tensors.extend(describe(leaf.name, leaf.value))
        else:
            objects[leaf.name] = leaf.value
    return tensors, objects


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
