"""Torch's own metadata classes, out of an index and into one."""

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
"""What metadata says of itself in the releases that ask; None in others."""

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
    """What metadata says of names, boxes and places, as an index.

    Args:
        metadata: with `storage_data`.
        results: what was written for its entries, with checksums if it is `Checksummed`. A tensor
            is of the dtype that it was written in, whatever its entry says.

    Raises:
        FormatError: it contradicts itself, or is of other classes than torch's own writers use.
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
            raise FormatError(f"an entry that is a {type(entry).__name__}", place=f"name {name!r}")
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
    """Whether every byte of an index has a checksum, so that it can stand in a manifest."""
    chunks = index.chunks
    filled = (chunks.sizes > 0).all(axis=1) if len(chunks.tensor) else np.zeros(0, bool)
    plain = (chunks.payload >= 0) | (chunks.transform > 0)
    return bool(((np.diff(chunks.block) > 0) | ~filled).all() and plain.all()
                and (index.objects.crc >= 0).all())  # fmt: skip


def says_no_more(metadata: Metadata, index: Index) -> bool:
    """Whether nothing in metadata would be lost if only its index were kept.

    What torch itself never uses does not count: whether gradients were wanted, and the like.
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
    """The pickle of metadata of any kind; its tensors' properties as all releases read them."""
    out = io.BytesIO()
    _Pickler(out, protocol=4).dump(metadata)
    return out.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """Releases before 2.15 take five properties, not the six that later ones pickle."""
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
    """Where an item is; storage of other classes is taken by its attributes."""
    place = metadata.storage_data.get(key)
    if place is None:
        raise FormatError("it has no storage location", place=f"name {key.fqn!r}")
    try:
        path, offset, length = place.relative_path, int(place.offset), int(place.length)
    except (AttributeError, TypeError, ValueError) as error:
        what = f"stored at a {type(place).__name__}"
        raise FormatError(what, place=f"name {key.fqn!r}") from error
    return str(path), offset, length, tuple(getattr(place, "transform_descriptors", None) or ())


def _dtype(name: str, entry: TensorStorageMetadata, written: list[WriteResult | None]) -> DType:
    """The dtype that all chunks were written in, or the one that the entry says."""
    kinds = {one.dtype for one in written if isinstance(one, Checksummed) and one.dtype}
    if len(kinds) > 1:
        raise FormatError(f"its chunks are of {sorted(kinds)}", place=f"name {name!r}")
    return DType.named(kinds.pop() if kinds else str(entry.properties.dtype))


def _checksummed(chunks: Chunks, rows: list[Row], written: list[WriteResult | None]) -> Chunks:
    """The chunks with what is known of their payloads."""
    payload = np.full(len(rows), -1, dtype=np.int64)
    checksums: list[np.ndarray[Any, Any]] = []
    for row, one in enumerate(written):
        mine = np.zeros(0, dtype=np.uint32)
        if isinstance(one, Checksummed) and one.dtype:
            if one.sizes != rows[row][2]:
                what = f"written as {list(one.sizes)}, planned as {list(rows[row][2])}"
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
    """Exactly of that class, with no attributes besides its own."""
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
    """Whether it says where and under which id something was saved, and no more."""
    if meta is None:
        return True
    rest = vars(meta).keys() - {"checkpoint_id", "save_id", "load_id"}
    return _is_plain(meta, StorageMeta) and not any(getattr(meta, name) for name in rest)
