"""Reads `.metadata` of `torch.distributed.checkpoint`, as releases 1.13 to 2.15 wrote it.

The classes in its pickle keep their raw states here. Each part of a state is checked when it is
used, and other parts are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from shardkeep.errors import FormatError
from shardkeep.filenames import metadata_rank
from shardkeep.format.dcp.metadata_columns import (
    Files,
    Placed,
    Row,
    chunk_columns,
    object_columns,
    tensor_columns,
)
from shardkeep.format.dcp.structure import structure_of
from shardkeep.format.excerpt import shown
from shardkeep.format.pickle.builders import CORE
from shardkeep.format.pickle.reader import loads_prefix
from shardkeep.format.pickle.registry import Builder, Registry
from shardkeep.types import DType, Index, Opaque, Path, Structure

__all__ = ["merge_metadata", "pickle_length", "read_metadata"]

Ints = tuple[int, ...]


class _Node:
    """An instance of one of DCP's metadata classes: its raw state; equal only to itself."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: Any = None


class _Metadata(_Node):
    __slots__ = ()


class _Tensor(_Node):
    __slots__ = ()


class _Bytes(_Node):
    __slots__ = ()


class _Properties(_Node):
    __slots__ = ()


class _Chunk(_Node):
    __slots__ = ()


class _Key(_Node):
    """A `MetadataIndex`. Its own equality ignores `index`, so keys are compared here later."""

    __slots__ = ()


class _Place(_Node):
    """A `_StorageInfo`: the location of an item."""

    __slots__ = ()


class _StorageMeta(_Node):
    __slots__ = ()


def _fill(node: _Node, state: Any) -> None:
    if node.state is not None:
        raise FormatError("metadata that is filled twice")
    node.state = state


_PACKAGES = ("torch.distributed.checkpoint", "torch.distributed._shard.checkpoint")
_CLASSES: dict[str, type[_Node]] = {
    "metadata.Metadata": _Metadata,
    "metadata.TensorStorageMetadata": _Tensor,
    "metadata.BytesStorageMetadata": _Bytes,
    "metadata.TensorProperties": _Properties,
    "metadata.ChunkStorageMetadata": _Chunk,
    "metadata.MetadataIndex": _Key,
    "metadata.StorageMeta": _StorageMeta,
    "filesystem._StorageInfo": _Place,
    "_fsspec_filesystem._StorageInfo": _Place,
}
_NAMED: dict[str, type[_Node]] = {
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties": _Properties,
    **{f"{package}.{name}": kind for package in _PACKAGES for name, kind in _CLASSES.items()},
}
_BUILDERS = Registry(
    {
        **CORE,
        **{
            name: Builder(kind, type=kind, fill=_fill, key=kind is _Key)
            for name, kind in _NAMED.items()
        },
    }
)


def read_metadata(data: bytes, *, file: str = ".metadata") -> Index:
    """Return the index of a checkpoint of DCP.

    The chunks have no payload positions (-1): the items' own headers have them.

    Args:
        data: the file; bytes after the pickle are ignored (see `extra["pickle_length"]`).
        file: names it in errors.

    Raises:
        FormatError: the metadata is invalid, contradicts itself, or refers to a file outside the
            folder.
    """
    return _index([_part(data, file)])


def merge_metadata(parts: Sequence[tuple[str, bytes]]) -> Index:
    """Return one index from the metadata that each rank wrote for itself (`use_collectives=False`).

    Args:
        parts: name (`__{rank}.metadata`) and bytes of each file. Where ranks have objects of the
            same name, or the same box of a tensor, the lowest rank's is used.

    Raises:
        FormatError: a file is invalid, or ranks disagree on a tensor's dtype or shape.
    """
    ordered = sorted(parts, key=lambda part: _rank(part[0]))
    return _index([_part(data, file) for file, data in ordered])


def pickle_length(data: bytes) -> int:
    """Return the bytes of the pickle at the start of a `.metadata`, including its STOP."""
    return loads_prefix(data, _BUILDERS)[1]


def _rank(name: str) -> tuple[int, str]:
    rank = metadata_rank(name.rpartition("/")[2])
    return (1 << 62 if rank is None else rank, name)


@contextmanager
def _naming(file: str) -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise error.within(file=file) from error


@dataclass(frozen=True, slots=True)
class _Part:
    """One file: its entries, and the locations of their items, by name and offsets."""

    file: str
    entries: dict[Any, Any]
    paths: dict[Any, Any] | None
    places: dict[tuple[str, Any], Placed]
    extra: dict[str, Any]


def _part(data: bytes, file: str) -> _Part:
    root, length = loads_prefix(data, _BUILDERS, file=file)
    with _naming(file):
        if type(root) is not _Metadata:
            raise FormatError(f"a pickle of a {_kind(root)}, not of DCP's Metadata")
        state = _state(root)
        paths = state.get("planner_data")
        return _Part(
            file=file,
            entries=_mapping(state, "state_dict_metadata"),
            paths=paths if type(paths) is dict else None,
            places=_places(_mapping(state, "storage_data")),
            extra={"format": "dcp", "pickle_length": length, **_extra(state)},
        )


def _kind(value: Any) -> str:
    return value.name if isinstance(value, Opaque) else type(value).__name__.lstrip("_")


def _state(node: Any) -> dict[Any, Any]:
    state = node.state
    if type(state) is not dict:
        raise FormatError(f"a {_kind(node)} without its attributes")
    return state


def _mapping(state: dict[Any, Any], key: str) -> dict[Any, Any]:
    value = state.get(key)
    if type(value) is not dict:
        raise FormatError(f"{key} is missing, or no mapping")
    return value


def _named(name: object) -> str:
    return f"name {shown(name)}"


def _extra(state: dict[Any, Any]) -> dict[str, Any]:
    """Return what else the metadata says in plain text, for people."""
    known = {"version": state.get("version")}
    meta = state.get("storage_meta")
    if type(meta) is _StorageMeta:
        for key in ("checkpoint_id", "save_id"):
            value = _state(meta).get(key)
            known[key] = str(value) if isinstance(value, PurePath) else value
    return {key: value for key, value in known.items() if type(value) is str}


def _places(storage: dict[Any, Any]) -> dict[tuple[str, Any], Placed]:
    places: dict[tuple[str, Any], Placed] = {}
    for key, place in storage.items():
        if type(key) is not _Key:
            raise FormatError(f"storage of a {_kind(key)}")
        state = _state(key)
        name, offsets = state.get("fqn"), state.get("offset")
        if type(name) is not str or (offsets is not None and not _are_offsets(offsets)):
            raise FormatError("storage of something without name or offsets", place=_named(name))
        if (name, offsets) in places:
            raise FormatError(f"two items at offsets {shown(offsets)}", place=_named(name))
        places[name, offsets] = _placed(place, name)
    return places


def _are_offsets(value: Any) -> bool:
    return type(value) is tuple and set(map(type, value)) <= {int}


def _placed(place: Any, name: str) -> Placed:
    """Return the location of an item; classes of other writers are read by attributes."""
    if type(place) is not _Place and type(place) is not Opaque:
        raise FormatError(f"stored at a {_kind(place)}", place=_named(name))
    state = _state(place)
    path, start, length = state.get("relative_path"), state.get("offset"), state.get("length")
    if type(path) is not str or type(start) is not int or type(length) is not int:
        raise FormatError("stored without a path, an offset or a length", place=_named(name))
    if not 0 <= start < 1 << 62 or not 0 <= length < 1 << 62:
        raise FormatError(f"stored at {shown(start)}, {shown(length)} bytes", place=_named(name))
    transforms = state.get("transform_descriptors") or ()
    if type(transforms) not in (list, tuple) or len(transforms) > _TRANSFORMS:
        raise FormatError("its storage location has invalid transforms", place=_named(name))
    if not all(type(transform) is str for transform in transforms):
        raise FormatError("its storage location has invalid transforms", place=_named(name))
    return path, start, length, tuple(transforms)


_TRANSFORMS = 16
"""Maximum number of stream transforms of one item."""


@dataclass(slots=True)
class _Tensors:
    """Tensors by name, gathered from all parts."""

    dtypes: dict[str, DType] = field(default_factory=dict)
    shapes: dict[str, Any] = field(default_factory=dict)
    boxes: dict[str, dict[Any, tuple[Any, Placed | None]]] = field(default_factory=dict)
    """Offsets -> sizes and item of each chunk; the item is None until a part has it."""


def _index(parts: Sequence[_Part]) -> Index:
    tensors, objects = _Tensors(), dict[str, Placed]()
    for part in parts:
        with _naming(part.file):
            for name, entry in part.entries.items():
                if type(name) is not str:
                    raise FormatError("a name is not a string", place=_named(name))
                if type(entry) is _Tensor:
                    _take_tensor(name, entry, part, tensors)
                elif type(entry) is _Bytes:
                    _take_object(name, part, objects)
                else:
                    raise FormatError(f"an entry that is a {_kind(entry)}", place=_named(name))
    with _naming(", ".join(part.file for part in parts[:2]) + ", ..." * (len(parts) > 2)):
        return _columns(parts, tensors, objects)


def _take_object(name: str, part: _Part, objects: dict[str, Placed]) -> None:
    place = part.places.get((name, None)) or part.places.get((name, ()))
    if place is None:
        raise FormatError("the object has no storage location", place=_named(name))
    objects.setdefault(name, place)


def _take_tensor(name: str, entry: _Tensor, part: _Part, tensors: _Tensors) -> None:
    state = _state(entry)
    dtype, shape = _dtype(name, state.get("properties")), state.get("size")
    if not _are_offsets(shape):
        raise FormatError(f"invalid shape: {shown(shape)}", place=_named(name))
    if tensors.dtypes.setdefault(name, dtype) != dtype:
        raise FormatError(f"ranks disagree on its dtype: {dtype}", place=_named(name))
    if tensors.shapes.setdefault(name, shape) != shape:
        raise FormatError(f"ranks disagree on its shape: {shown(shape)}", place=_named(name))
    boxes = tensors.boxes.setdefault(name, {})
    chunks = state.get("chunks") or ()
    if type(chunks) not in (list, tuple):
        raise FormatError(f"chunks that are a {_kind(chunks)}", place=_named(name))
    for chunk in chunks:
        if type(chunk) is not _Chunk:
            raise FormatError(f"a chunk that is a {_kind(chunk)}", place=_named(name))
        box = _state(chunk)
        offsets: Any = box.get("offsets")
        sizes: Any = box.get("sizes")
        if not _are_offsets(offsets) or not _are_offsets(sizes):
            raise FormatError("a chunk has invalid offsets or sizes", place=_named(name))
        place = part.places.get((name, offsets))
        if place is None and not any(offsets):
            place = part.places.get((name, None))
        known = boxes.get(offsets)
        if known is None or _replaces(name, sizes, place, known):
            boxes[offsets] = sizes, place


def _replaces(name: str, sizes: Any, place: Placed | None, known: tuple[Any, Any]) -> bool:
    """Return whether a chunk is used instead of the known one with the same offsets.

    Replicas repeat a box. An empty box may share its offsets with one that has elements.
    """
    if sizes == known[0]:
        return known[1] is None
    if 0 in sizes:
        return False
    if 0 in known[0]:
        return place is not None
    what = f"two chunks at one place: {shown(sizes)} and {shown(known[0])}"
    raise FormatError(what, place=_named(name))


def _dtype(name: str, properties: Any) -> DType:
    """Return the dtype, the first of five or more properties, in a tuple or by name."""
    state = properties.state if type(properties) is _Properties else None
    if type(state) is tuple and len(state) >= 5:
        dtype = state[0]
    elif type(state) is dict:
        dtype = state.get("dtype")
    else:
        raise FormatError("a tensor without properties", place=_named(name))
    if type(dtype) is not DType:
        raise FormatError(f"unknown dtype {_kind(dtype)}", place=_named(name))
    return dtype


def _columns(parts: Sequence[_Part], tensors: _Tensors, objects: dict[str, Placed]) -> Index:
    clash = next((name for name in objects if name in tensors.dtypes), None)
    if clash is not None:
        raise FormatError(
            "it is a tensor in one rank's metadata and an object in another's", place=_named(clash)
        )
    files = Files()
    names = list(tensors.dtypes)
    table = tensor_columns(names, list(tensors.dtypes.values()), list(tensors.shapes.values()))
    chunks = chunk_columns(list(_rows(tensors)), table, files)
    known = object_columns(objects, files)
    structure, legacy_duplicates = _structure(parts, tensors, objects)
    extra = parts[0].extra if len(parts) == 1 else {**parts[0].extra, "parts": len(parts)}
    return Index(
        files=files.files,
        tensors=table,
        chunks=chunks,
        objects=known,
        transforms=files.transforms,
        structure=structure,
        legacy_duplicates=legacy_duplicates,
        extra=extra,
    )


def _rows(tensors: _Tensors) -> Iterator[Row]:
    for number, (name, boxes) in enumerate(tensors.boxes.items()):
        for offsets, (sizes, place) in boxes.items():
            if place is not None:
                yield number, offsets, sizes, place
            elif 0 not in sizes:
                raise FormatError(
                    f"its chunk at {shown(offsets)} has no storage location", place=_named(name)
                )


def _structure(
    parts: Sequence[_Part], tensors: _Tensors, objects: dict[str, Placed]
) -> tuple[Structure | None, dict[str, Path]]:
    paths: dict[Any, Any] = {}
    for part in parts:
        for name, path in (part.paths or {}).items():
            paths.setdefault(name, path)
    if all(part.paths is None for part in parts):
        return None, {}
    return structure_of(paths, tensors.dtypes, objects)
