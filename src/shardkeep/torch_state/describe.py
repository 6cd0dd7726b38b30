"""Description of a state on one rank: its pieces in memory, its objects, and its claim."""

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

__all__ = ["LocalState", "describe_expanded", "describe_state", "describe_tensors"]

_MAX_MANIFEST_VALUE_CHARS = 16 * 1024
"""Maximum JSON length of a value that the manifest repeats. Longer ones are in the data only."""

_SCALARS = (bool, int, float, type(None))
"""Types whose JSON is never long."""


@dataclass(frozen=True, slots=True, eq=False)
class LocalState:
    """What this rank holds of a state.

    Attributes:
        claim: names, pieces and values, for the other ranks.
        memory: the tensor of each piece, in the order of the claim. Its shape is that of the
            piece's box; strides and device are any. It may be attached to a graph.
        addresses: the address of each piece that is in CPU memory in C order; 0 for the others.
        objects: name -> value of objects and their legacy duplicates.
    """

    claim: Claim
    memory: Sequence[torch.Tensor]
    addresses: I64
    objects: Mapping[str, Any]


def describe_state(
    state: Mapping[Any, Any], *, nested: bool = True, rank: tuple[int, int] = (0, 1)
) -> LocalState:
    """Return a description of a state. No tensor data moves.

    Values that are marked `Replicated` are hashed. Pieces larger than the maximum chunk size are
    cut, so that ranks that hold the same piece can each write a part of it.

    Args:
        state: the state that is saved.
        nested: False takes each top-level value as one leaf.
        rank: this rank, and the number of ranks.

    Raises:
        Conflict: two values would have the same name, or a value cannot be saved.
    """
    return describe_expanded(call_state_dicts(state)[0], nested=nested, rank=rank)


def describe_expanded(
    plain: Mapping[Any, Any], *, nested: bool = True, rank: tuple[int, int] = (0, 1)
) -> LocalState:
    """Describe a state whose stateful objects are expanded: nothing here waits for other ranks.

    See `describe_state` for the arguments and errors.
    """
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
    """Return the tensors among the leaves, and the objects by name.

    The third value says whether some of the tensors are inner tensors of a subclass.

    Raises:
        Conflict: a tensor cannot be saved or loaded, or two values would have the same name.
    """
    rows, objects, inner = ColumnsBuilder(), dict[str, Any](), False
    names, codes, shapes = rows.names, rows.codes, rows.shapes
    memory, pointers, apart = rows.memory, rows.pointers, rows.apart
    for name, value in flat.items():
        if is_whole_plain_tensor(value):
            names.append(name)
            codes.append(DTYPE_CODES[value.dtype])
            shapes.append(value.shape)
            plain = (
                value.is_contiguous() and value.is_cpu
            )  # As `is_contiguous_on_cpu`, inlined for speed.
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
    """Return each top-level value as a leaf, named (and checked) as `flatten` does."""
    shallow = flatten(dict.fromkeys(state, 0), is_any_tensor)
    leaves = shallow.structure.leaves
    return Flat([state[path[0]] for path in leaves.values()], shallow.structure, ())


def _structure(structure: Structure, tensors: Iterable[str]) -> Structure:
    """Return a structure with inner tensors of a subclass below the path of their tensor."""
    leaves = structure.leaves
    below: dict[str, list[str]] = {}
    for name in tensors:
        if name not in leaves:
            below.setdefault(_owning_leaf(name, leaves), []).append(name)
    paths: dict[str, Path] = {}
    containers = dict(structure.containers)
    before = [0]  # For each old leaf, the number of new leaves before it.
    for name, path in leaves.items():
        for inner in below.get(name, [name]):
            rest = tuple(inner[len(name) + 1 :].split(".")) if inner != name else ()
            paths[inner] = path + rest
            containers |= {path + rest[:depth]: "dict" for depth in range(len(rest))}
        before.append(len(paths))
    empties = {path: before[count] for path, count in structure.empties.items()}
    return Structure(paths, containers, empties)


def _owning_leaf(inner: str, leaves: Mapping[str, Path]) -> str:
    """Return the name of the leaf that an inner tensor belongs to."""
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
        if isinstance(encoded, _SCALARS) or len(json.dumps(encoded)) <= _MAX_MANIFEST_VALUE_CHARS:
            small[name] = encoded
    return small
