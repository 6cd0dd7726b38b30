"""Writes an index as `.metadata` of `torch.distributed.checkpoint`, for torch from 2.0 on.

It contains what every release opens (docs/format.md): the five-field state of `TensorProperties`
under its old module path, which the newest release still imports; no `StorageMeta`, which 2.0 to
2.3 lack; no path objects. Attributes that newer classes have and the pickle lacks fall back to the
defaults of their classes.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from shardkeep.format.dcp.metadata_paths import dcp_path, path_columns
from shardkeep.format.paths import Paths, names_of
from shardkeep.format.pickle.records import Bytes, Part, integers, records, references
from shardkeep.format.pickle.writer import FALSE, NONE, Pickle, integer, new, reference, sequence
from shardkeep.plan.distinct import distinct
from shardkeep.types import DTYPES, I64, Index, YieldGil, never_yield

__all__ = ["dcp_path", "metadata_bytes"]

_METADATA = "torch.distributed.checkpoint.metadata"
_LEGACY = "torch.distributed._shard.sharded_tensor.metadata"
_CLASSES = {
    "Size": "torch",
    "_get_layout": "torch.serialization",
    "TensorProperties": _LEGACY,
    "MEM_FORMAT_ENCODING": _LEGACY,
    "Metadata": _METADATA,
    "TensorStorageMetadata": _METADATA,
    "ChunkStorageMetadata": _METADATA,
    "BytesStorageMetadata": _METADATA,
    "MetadataIndex": _METADATA,
    "_StorageInfo": "torch.distributed.checkpoint.filesystem",
}
"""Each class, and the module that contains it in every release."""

_ATTRIBUTES = "properties size chunks offsets sizes fqn index offset relative_path length".split()


def metadata_bytes(
    index: Index, paths: Paths | None = None, yield_gil: YieldGil = never_yield
) -> bytes:
    """Return the pickle, including its STOP byte.

    Tensors come first, then objects, in the order of the index, and legacy duplicates last: torch's
    converter (`dcp_to_torch_save`) fills containers in this order, and a duplicate must not hide
    its leaves.

    Args:
        index: the content of the checkpoint, with locations.
        paths: the paths of its structure, if they are known already.
        yield_gil: called between pieces of work.
    """
    out = _Writer(index)
    tables: list[bytes] = []
    for name, parts in (
        ("state_dict_metadata", (out.tensor_entries, out.object_entries)),
        ("planner_data", (partial(out.paths, paths),)),
        ("storage_data", (out.chunk_places, out.object_places)),
    ):
        tables.append(out.text(name) + b"}(")
        for part in parts:
            yield_gil()
            tables.append(part())
        tables.append(b"u")
    yield_gil()
    # Long parts are joined only once: each copy of them takes as long as making them.
    return out.pickle.finish(out.new("Metadata"), *tables, b"ub")


class _Writer:
    """Writes the three mappings of a `Metadata`, each as records."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.pickle = Pickle()
        # Before the names: references to low numbers are short.
        self._classes = {name: self._named(module, name) for name, module in _CLASSES.items()}
        for attribute in _ATTRIBUTES:
            self.text(attribute)
        self._properties = self._properties_by_code()
        self._names = references(self.pickle.texts(names_of(index)))
        objects = {name: row for row, name in enumerate(index.objects.names)}
        ordinary = [row for name, row in objects.items() if name not in index.legacy_duplicates]
        legacy_duplicates = [objects[name] for name in index.legacy_duplicates]
        self._objects = np.array([*ordinary, *legacy_duplicates], np.int64)
        """Rows of the objects, with the legacy duplicates last."""
        self._shapes, self._offsets, self._extents = self._sizes()
        self._chunks = _stored(index, self._offsets)

    def text(self, value: str) -> bytes:
        """Push a str."""
        return reference(self.pickle.text(value))

    def _named(self, module: str, name: str) -> bytes:
        return reference(self.pickle.named(module, name))

    def kind(self, name: str) -> bytes:
        """Push a class."""
        return self._classes[name]

    def new(self, name: str) -> bytes:
        """Start an instance of a class and its attributes; "ub" ends it."""
        return self.kind(name) + b")\x81}("

    def _sizes(self) -> tuple[I64, I64, I64]:
        """Return the numbers of the `torch.Size` of shapes, and of chunks' offsets and sizes."""
        tensors, chunks = self.index.tensors, self.index.chunks
        table = np.concatenate([tensors.shape, chunks.offsets, chunks.sizes])
        chunk_ndim = tensors.ndim[chunks.tensor]
        ndim = np.concatenate([tensors.ndim, chunk_ndim, chunk_ndim])
        if (ndim < table.shape[1]).any():  # The padding differs (1 or 0), but it is not written.
            table[np.arange(table.shape[1]) >= ndim[:, None]] = 0
        number, first = distinct([ndim, *table.T])
        size = self.kind("Size")
        constants = [
            self.pickle.constant(size + sequence([integer(n) for n in row[:length]]) + b"\x85R")
            for row, length in zip(table[first].tolist(), ndim[first].tolist(), strict=True)
        ]
        numbers = np.array(constants, np.int64)[number]
        chunks_from, sizes_from = np.cumsum([len(tensors.names), len(chunk_ndim)]).tolist()
        return numbers[:chunks_from], numbers[chunks_from:sizes_from], numbers[sizes_from:]

    def _properties_by_code(self) -> I64:
        """Return a `TensorProperties` for each dtype code in use; tensors of one dtype share it."""
        layout = self.kind("_get_layout") + self.text("torch.strided") + b"\x85R"
        memory = self.kind("MEM_FORMAT_ENCODING") + integer(0) + b"\x85R"  # contiguous
        layout, memory = (reference(self.pickle.constant(part)) for part in (layout, memory))
        numbers = np.zeros(len(DTYPES), np.int64)
        for code in np.flatnonzero(np.bincount(self.index.tensors.dtype)).tolist():
            dtype = self._named("torch", DTYPES[code].name)
            state = sequence([dtype, layout, FALSE, memory, FALSE])
            numbers[code] = self.pickle.constant(new(self.kind("TensorProperties"), state))
        return numbers

    def tensor_entries(self) -> bytes:
        """Return name and entry of the tensors, for `state_dict_metadata`: a record for each chunk.

        The record of a tensor's first chunk includes the start of the entry, that of the last its
        end.
        """
        tensors, text = self.index.tensors, self.text
        counts = np.bincount(self.index.chunks.tensor[self._chunks], minlength=len(tensors.names))
        slots = np.maximum(counts, 1)  # A tensor without a chunk has an entry, too.
        tensor = np.repeat(np.arange(len(counts)), slots)
        first = np.append(True, tensor[1:] != tensor[:-1])[: len(tensor)]
        last = np.append(tensor[1:] != tensor[:-1], True)[: len(tensor)]
        there = np.repeat(counts > 0, slots)
        chunk = np.zeros(len(tensor), np.int64)
        chunk[there] = self._chunks
        offsets, extents = (np.append(n, 0)[chunk] for n in (self._offsets, self._extents))
        head: tuple[bytes | Bytes, ...] = (
            self._names[tensor],
            self.new("TensorStorageMetadata") + text("properties"),
            references(self._properties[tensors.dtype[tensor]]),
            text("size"),
            references(self._shapes[tensor]),
            text("chunks") + b"](",
        )
        body: tuple[bytes | Bytes, ...] = (
            self.new("ChunkStorageMetadata") + text("offsets"),
            references(offsets),
            text("sizes"),
            references(extents),
            b"ub",
        )
        parts: list[Part] = [(part, first) for part in head]
        parts += [(part, there) for part in body]
        return records(len(tensor), [*parts, (b"eub", last)])

    def object_entries(self) -> bytes:
        """Return name and entry of the objects, for `state_dict_metadata`."""
        entry = self.kind("BytesStorageMetadata") + b")\x81"
        return records(len(self._objects), [self._object_names, entry])

    @property
    def _object_names(self) -> Bytes:
        return self._names[len(self.index.tensors.names) + self._objects]

    def paths(self, paths: Paths | None) -> bytes:
        """Return name and path of everything, for `planner_data`."""
        numbers, length = path_columns(self.pickle, self.index, paths)
        count = len(self.index.tensors.names)
        rows = np.concatenate([np.arange(count), count + self._objects])
        numbers, length = numbers[rows], length[rows]
        keys: list[Part] = [
            (references(numbers[:, depth]), length > depth) for depth in range(numbers.shape[1])
        ]
        return records(len(length), [self._names[rows], b"(", *keys, b"t"])

    def chunk_places(self) -> bytes:
        """Return key and location of the chunks, for `storage_data`."""
        chunks, rows = self.index.chunks, self._chunks
        tensor = chunks.tensor[rows]
        hint = np.arange(len(rows)) - np.searchsorted(tensor, tensor)
        key: list[Part] = [
            self.new("MetadataIndex") + self.text("fqn"),
            self._names[tensor],
            self.text("index"),
            integers(hint),
            self.text("offset"),
            references(self._offsets[rows]),
            b"ub",
        ]
        place = self._place(chunks.file, chunks.item, chunks.length, chunks.transform, rows)
        return records(len(rows), [*key, *place])

    def object_places(self) -> bytes:
        """Return key and location of the objects, for `storage_data`."""
        objects, rows = self.index.objects, self._objects
        key: list[Part] = [
            self.new("MetadataIndex") + self.text("fqn"),
            self._object_names,
            self.text("index") + NONE + self.text("offset") + NONE + b"ub",
        ]
        place = self._place(objects.file, objects.item, objects.length, objects.transform, rows)
        return records(len(rows), [*key, *place])

    def _place(
        self,
        file: NDArray[np.int32],
        item: I64,
        length: I64,
        transform: NDArray[np.int16],
        rows: I64,
    ) -> list[Part]:
        """Return a `_StorageInfo` for each of these rows of a table."""
        text = self.text
        files = np.array([self.pickle.text(name) for name in self.index.files], np.int64)
        descriptors = [
            text("transform_descriptors") + b"](%be" % b"".join(map(text, names))
            for names in self.index.transforms[1:]
        ]
        return [
            self.new("_StorageInfo") + text("relative_path"),
            references(files[file[rows]]),
            text("offset"),
            integers(item[rows]),
            text("length"),
            integers(length[rows]),
            *((part, transform[rows] == code) for code, part in enumerate(descriptors, 1)),
            b"ub",
        ]


def _stored(index: Index, offsets: I64) -> I64:
    """Return the rows of the chunks that DCP can represent, in their order.

    DCP identifies an item by name and offset alone. Of several chunks of a tensor at one offset,
    the
    first that has elements is kept: an empty one would hide the bytes of the others.
    """
    chunks = index.chunks
    place, first = distinct([chunks.tensor, offsets])
    if len(first) == len(place):
        return np.arange(len(place))
    empty = (chunks.sizes == 0).any(axis=1)
    order = np.lexsort((empty, place))
    kept: I64 = order[np.append(True, np.diff(place[order]) > 0)]
    return kept[np.argsort(first)]
