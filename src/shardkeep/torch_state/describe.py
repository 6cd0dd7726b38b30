"""A state as one rank sees it: its pieces in memory, its objects, and the claim that names them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardkeep import settings
from shardkeep.format import values
from shardkeep.state.flatten import Flat, flatten
from shardkeep.state.markers import Unwrapped, key_of, unmarked
from shardkeep.torch_state.columns import ColumnsBuilder, aliases, cut_large
from shardkeep.torch_state.content_digests import content_digests
from shardkeep.torch_state.pieces import (
    DTYPE_CODES,
    check_unique_names,
    describe_tensor,
    is_any_tensor,
    is_tensor,
    is_whole_plain_tensor,
)
from shardkeep.torch_state.stateful import call_state_dicts
from shardkeep.types import I64, Claim, Path, Structure

__all__ = ["LocalState", "describe_state", "describe_tensors"]

_SMALL_VALUE = 16 * 1024
"""Values of up to this many characters of JSON stand in the manifest; larger ones in their item."""

_SCALARS = (bool, int, float, type(None))
"""JSON that is never large."""


@dataclass(frozen=True, slots=True, eq=False)
class LocalState:
    """What this rank holds of a state.

    Attributes:
        claim: names and boxes, for the other ranks.
        memory: of each piece, row by row as in the claim; any strides and device, some of them not
            detached. The shape is that of the piece's box.
        addresses: of each piece, where it lies in memory of the CPU in C order; 0 if it does not.
        objects: name -> value of objects and twins.
    """

    claim: Claim
    memory: Sequence[torch.Tensor]
    addresses: I64
    objects: Mapping[str, Any]


def describe_state(
    state: Mapping[Any, Any], *, nested: bool = True, rank: tuple[int, int] = (0, 1)
) -> LocalState:
    """Flatten and describe; no tensor data moves. What is marked `Replicated` is digested.

    Pieces of more than `knobs.part()` bytes are cut, so that ranks that hold the same can share
    them out.

    Args:
        state: what `save` is given.
        nested: False takes each top-level value as one leaf.
        rank: which one this is, of so many.

    Raises:
        Conflict: two things under one name, or something that can't be saved; it names it.
    """
    plain, _ = call_state_dicts(state)
    if nested:
        flat, marked = unmarked(plain, is_any_tensor, lambda _: key_of(*rank))
    else:
        flat, marked = _top_level(plain), Unwrapped(plain)
    rows, objects, inner = describe_tensors(flat)
    tensors = rows.tensors()
    pieces = cut_large(tensors, rows.pieces(tensors), settings.max_chunk_bytes())
    structure = _structure(flat.structure, rows.names) if inner else flat.structure
    return LocalState(
        claim=Claim(
            tensors=tensors,
            piece=pieces.piece,
            offsets=pieces.offsets,
            sizes=pieces.sizes,
            alias=aliases(tensors, pieces),
            objects=tuple(objects),
            values=_small_values(objects),
            structure=structure,
            legacy_duplicates={twin.name: twin.path for twin in flat.legacy_duplicates},
            marks=marked.marks,
            content=content_digests(
                marked.places("Replicated"), structure, tensors, pieces, objects
            ),
        ),
        memory=pieces.memory,
        addresses=pieces.addresses,
        objects={**objects, **{twin.name: twin.value for twin in flat.legacy_duplicates}},
    )


def describe_tensors(flat: Flat) -> tuple[ColumnsBuilder, dict[str, Any], bool]:
    """The tensors among the leaves, the objects by name, and whether some are inner tensors.

    Raises:
        Conflict: a tensor that can't be saved or filled, or two things under one name.
    """
    rows, objects, inner = ColumnsBuilder(), dict[str, Any](), False
    names, codes, shapes = rows.names, rows.codes, rows.shapes
    memory, pointers, apart = rows.memory, rows.pointers, rows.apart
    for name, value in flat.items():
        if is_whole_plain_tensor(value):
            names.append(name)
            codes.append(DTYPE_CODES[value.dtype])
            shapes.append(value.shape)
            plain = value.is_contiguous() and value.is_cpu  # `in_order`, but no call of it
            if not plain or value.is_conj() or value.is_neg():
                apart.append(len(memory))
            memory.append(value)
            pointers.append(value.data_ptr())
        elif is_tensor(value):
            for described in describe_tensor(name, value):
                rows.add(described)
                inner = inner or described.name != name
        else:
            objects[name] = value
    if inner:
        check_unique_names([*objects, *names])
    return rows, objects, inner


def _top_level(state: Mapping[Any, Any]) -> Flat:
    """Each value as it is; names and their collisions are those of any state with these keys."""
    shallow = flatten(dict.fromkeys(state, 0), is_any_tensor)
    leaves = shallow.structure.leaves
    return Flat([state[path[0]] for path in leaves.values()], shallow.structure, ())


def _structure(structure: Structure, tensors: Iterable[str]) -> Structure:
    """The state's structure, with the inner tensors of a subclass below where it stands."""
    leaves = structure.leaves
    below: dict[str, list[str]] = {}
    for name in tensors:
        if name not in leaves:
            below.setdefault(_owner(name, leaves), []).append(name)
    paths: dict[str, Path] = {}
    containers = dict(structure.containers)
    before = [0]  # how many leaves there are now before each of the old ones
    for name, path in leaves.items():
        for inner in below.get(name, [name]):
            rest = tuple(inner[len(name) + 1 :].split(".")) if inner != name else ()
            paths[inner] = path + rest
            containers |= {path + rest[:depth]: "dict" for depth in range(len(rest))}
        before.append(len(paths))
    empties = {path: before[count] for path, count in structure.empties.items()}
    return Structure(paths, containers, empties)


def _owner(inner: str, leaves: Mapping[str, Path]) -> str:
    """The leaf that an inner tensor belongs to."""
    name = inner
    while name not in leaves:
        name = name.rpartition(".")[0]
    return name


def _small_values(objects: Mapping[str, Any]) -> dict[str, Any]:
    small = {}
    for name, value in objects.items():
        try:
            encoded = values.encode(value)
        except values.NotEncodable:
            continue
        if isinstance(encoded, _SCALARS) or len(json.dumps(encoded)) <= _SMALL_VALUE:
            small[name] = encoded
    return small
