"""Conversion between an index and torch's own metadata classes."""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as LegacyProperties
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from shardkeep.checkpoint.reader import CheckpointReader
from shardkeep.dcp.bridge.items import Checksummed
from shardkeep.errors import FormatError
from shardkeep.format.dcp.metadata_columns import (
    Files,
    Placed,
    Row,
    chunk_columns,
    object_columns,
    tensor_columns,
)
from shardkeep.format.dcp.metadata_write import dcp_path
from shardkeep.format.dcp.structure import structure_of
from shardkeep.types import DTYPES, Chunks, DType, Index, Objects

__all__ = [
    "VERSION",
    "index_of",
    "is_whole",
    "metadata_of",
    "metadata_of_save",
    "pickled",
    "says_no_more",
]

VERSION = getattr(filesystem, "CURRENT_DCP_VERSION", None)
"""The version in metadata, in releases that check it; None in others."""

Results = Mapping[MetadataIndex, WriteResult]


def metadata_of(source: CheckpointReader | Index, checkpoint_id: Any = None) -> Metadata:
    """Return what a checkpoint holds as torch's own classes, as torch's reader would.

    Duplicate entries for releases up to 2.3 are left out: the planners of later releases would
    take a checkpoint that has them for one that such a release wrote.
    """
    if isinstance(source, Index):
        return _to_torch(source)
    trailer = source.found.trailer
    if trailer is None:
        return _to_torch(source.index)
    return metadata_of_save(source.index, checkpoint_id, trailer.save_id)


def metadata_of_save(index: Index, checkpoint_id: Any, save_id: str) -> Metadata:
    """Return what a save of Shardkeep's wrote as torch's own classes."""
    metadata = _to_torch(index)
    metadata.storage_meta = StorageMeta(checkpoint_id, save_id)
    if VERSION is not None:
        metadata.version = VERSION
    return metadata


def index_of(metadata: Metadata, results: Results | None = None) -> Index:
    """Return the index that is equivalent to torch's metadata.

    Args:
        metadata: with `storage_data`.
        results: what was written for its entries, with checksums where it is `Checksummed`. A
            tensor has the dtype in which it was written, even if its entry has another.

    Raises:
        FormatError: the metadata contradicts itself, or has classes that torch's writers don't use.
    """
    results = results or {}
    files = Files()
    dtypes: dict[str, DType] = {}
    shapes: list[tuple[int, ...]] = []
    rows: list[Row] = []
    written: list[WriteResult | None] = []
    objects: dict[str, Placed] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            objects[name] = _placed(metadata, MetadataIndex(name))
            continue
        if not isinstance(entry, TensorStorageMetadata):
            raise FormatError(
                f"its entry is of class {type(entry).__name__}", place=f"name {name!r}"
            )
        boxes = dict.fromkeys((tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks)
        keys = [MetadataIndex(name, box[0]) for box in boxes]
        kept = [
            (key, box) for key, box in zip(keys, boxes, strict=True)
            if key in metadata.storage_data or 0 not in box[1]
        ]  # fmt: skip
        found = [results.get(key) for key, _ in kept]
        for key, box in kept:
            rows.append((len(dtypes), *box, _placed(metadata, key)))
        written += found
        dtypes[name] = _dtype(name, entry, found)
        shapes.append(tuple(entry.size))
    tensors = tensor_columns(list(dtypes), list(dtypes.values()), shapes)
    chunks = chunk_columns(rows, tensors, files)
    known = object_columns(objects, files)
    paths = metadata.planner_data
    structure, legacy_duplicates = (
        (None, {}) if paths is None else structure_of(paths, dtypes, objects)
    )
    return Index(
        files=files.files,
        tensors=tensors,
        chunks=_checksummed(chunks, rows, written),
        objects=_with_crcs(known, results),
        transforms=files.transforms,
        structure=structure,
        legacy_duplicates=legacy_duplicates,
    )


def is_whole(index: Index) -> bool:
    """Return whether every byte has a checksum, as a manifest requires."""
    chunks = index.chunks
    filled = (chunks.sizes > 0).all(axis=1) if len(chunks.tensor) else np.zeros(0, bool)
    plain = (chunks.payload >= 0) | (chunks.transform > 0)
    return bool(((np.diff(chunks.block) > 0) | ~filled).all() and plain.all()
                and (index.objects.crc >= 0).all())  # fmt: skip


def says_no_more(metadata: Metadata, index: Index) -> bool:
    """Return whether an index holds all that the metadata holds.

    Properties that torch itself never uses, such as `requires_grad`, are ignored.
    """
    return (
        _is_plain(metadata, Metadata)
        and all(map(_is_plain_entry, metadata.state_dict_metadata.values()))
        and all(type(key) is str for key in metadata.state_dict_metadata)
        and all(_is_plain(key, MetadataIndex) for key in metadata.storage_data)
        and all(_is_plain(place, _StorageInfo) for place in metadata.storage_data.values())
        and _is_plain_meta(getattr(metadata, "storage_meta", None))
        and metadata.planner_data == _planner_data(index)
        and len(metadata.storage_data) == len(index.chunks.tensor) + len(index.objects.names)
    )


def pickled(metadata: Any) -> bytes:
    """Return the pickle of metadata of any class, in a form that all releases of torch can read."""
    out = io.BytesIO()
    _Pickler(out, protocol=4).dump(metadata)
    return out.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """Reduce tensor properties to the five that releases before 2.15 can read, not six."""
        if type(value) is not TensorProperties:
            return NotImplemented
        properties: Any = value
        new: Any = copyreg
        return new.__newobj__, (TensorProperties,), properties.__getstate__()[:5]


def _to_torch(index: Index) -> Metadata:
    """Return the metadata that stock torch's reader would give for this checkpoint.

    What the index does not know, such as `requires_grad`, has its default.
    """
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    tensors, chunks = index.tensors, index.chunks
    dtypes = [getattr(torch, DTYPES[number].name) for number in tensors.dtype.tolist()]
    ranks = tensors.ndim.tolist()
    for name, dtype, ndim, shape in zip(
        tensors.names, dtypes, ranks, tensors.shape.tolist(), strict=True
    ):
        properties = TensorProperties(dtype=dtype)
        entries[name] = TensorStorageMetadata(properties, torch.Size(shape[:ndim]), [])
    for tensor, offsets, sizes, info in zip(
        chunks.tensor.tolist(),
        chunks.offsets.tolist(),
        chunks.sizes.tolist(),
        _storage_infos(index, chunks),
        strict=True,
    ):
        name, ndim = tensors.names[tensor], ranks[tensor]
        chunk = ChunkStorageMetadata(torch.Size(offsets[:ndim]), torch.Size(sizes[:ndim]))
        listed = entries[name].chunks
        places[MetadataIndex(name, chunk.offsets, len(listed))] = info
        listed.append(chunk)
    for name, info in zip(index.objects.names, _storage_infos(index, index.objects), strict=True):
        if name in index.legacy_duplicates:
            continue
        entries[name] = BytesStorageMetadata()
        places[MetadataIndex(name)] = info
    paths = _planner_data(index)
    if paths is not None:
        paths = {name: path for name, path in paths.items() if name not in index.legacy_duplicates}
    return Metadata(entries, planner_data=paths, storage_data=places)


def _storage_infos(index: Index, table: Chunks | Objects) -> Iterator[_StorageInfo]:
    """Yield where each item of a table is stored. Older releases have no field for transforms."""
    kind: Any = _StorageInfo
    columns = (table.file, table.item, table.length, table.transform)
    for file, start, length, number in zip(*(c.tolist() for c in columns), strict=True):
        transforms = index.transforms[number]
        more = [list(transforms)] if transforms else []
        yield kind(index.files[file], start, length, *more)


def _planner_data(index: Index) -> dict[str, tuple[str | int, ...]] | None:
    if index.structure is None:
        return None
    containers = index.structure.containers
    paths = {**index.structure.leaves, **index.legacy_duplicates}
    return {name: dcp_path(path, containers) for name, path in paths.items()}


def _placed(metadata: Metadata, key: MetadataIndex) -> Placed:
    """Return where an item is stored; locations of other classes are read by their attributes."""
    place = metadata.storage_data.get(key)
    if place is None:
        raise FormatError("it has no storage location", place=f"name {key.fqn!r}")
    try:
        path, offset, length = place.relative_path, int(place.offset), int(place.length)
    except (AttributeError, TypeError, ValueError) as error:
        what = f"its storage location is a {type(place).__name__} without path, offset or length"
        raise FormatError(what, place=f"name {key.fqn!r}") from error
    return str(path), offset, length, tuple(getattr(place, "transform_descriptors", None) or ())


def _dtype(name: str, entry: TensorStorageMetadata, written: list[WriteResult | None]) -> DType:
    """Return the dtype that all chunks were written in, or else that of the entry."""
    kinds = {one.dtype for one in written if isinstance(one, Checksummed) and one.dtype}
    if len(kinds) > 1:
        what = f"its chunks have different dtypes: {', '.join(sorted(kinds))}"
        raise FormatError(what, place=f"name {name!r}")
    return DType.named(kinds.pop() if kinds else str(entry.properties.dtype))


def _checksummed(chunks: Chunks, rows: list[Row], written: list[WriteResult | None]) -> Chunks:
    """Return the chunks with the checksums and positions of their payloads, where known."""
    payload = np.full(len(rows), -1, dtype=np.int64)
    checksums: list[np.ndarray[Any, Any]] = []
    for row, one in enumerate(written):
        mine = np.zeros(0, dtype=np.uint32)
        if isinstance(one, Checksummed) and one.dtype:
            if one.sizes != rows[row][2]:
                what = f"written with shape {list(one.sizes)}, planned with {list(rows[row][2])}"
                raise FormatError(what, place=f"name {one.index.fqn!r}")
            mine = np.frombuffer(one.checksums, "<u4").astype(np.uint32)
            if one.payload >= 0:
                payload[row] = chunks.item[row] + one.payload
        checksums.append(mine)
    counts = np.fromiter(map(len, checksums), np.int64, len(checksums))
    block = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    joined = np.concatenate([np.zeros(0, np.uint32), *checksums])
    return replace(chunks, payload=payload, block=block, checksums=joined)


def _with_crcs(objects: Objects, results: Results) -> Objects:
    found = (results.get(MetadataIndex(name)) for name in objects.names)
    crc = [one.crc if isinstance(one, Checksummed) else -1 for one in found]
    return replace(objects, crc=np.array(crc, dtype=np.int64))


def _is_plain(value: Any, kind: Any) -> bool:
    """Return whether a value is exactly of a class, with no attributes but the class's fields."""
    known = _fields(kind)
    return type(value) is kind and vars(value).keys() <= known


@cache
def _fields(kind: Any) -> frozenset[str]:
    return frozenset(field.name for field in fields(kind))


def _is_plain_entry(entry: Any) -> bool:
    if not isinstance(entry, TensorStorageMetadata):
        return _is_plain(entry, BytesStorageMetadata)
    properties: Any = entry.properties
    known = _is_plain(properties, TensorProperties) or _is_plain(properties, LegacyProperties)
    return (
        _is_plain(entry, TensorStorageMetadata)
        and known
        and properties.layout is torch.strided
        and all(_is_plain(chunk, ChunkStorageMetadata) for chunk in entry.chunks)
    )


def _is_plain_meta(meta: Any) -> bool:
    """Return whether a `StorageMeta` holds nothing but ids."""
    if meta is None:
        return True
    rest = vars(meta).keys() - {"checkpoint_id", "save_id", "load_id"}
    return _is_plain(meta, StorageMeta) and not any(getattr(meta, name) for name in rest)
