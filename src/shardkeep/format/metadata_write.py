"""An index as the `.metadata` file of `torch.distributed.checkpoint`, for torch from 2.0 on.

What every release opens (docs/format.md): the five-field state of
`TensorProperties`, under its old module path, which is still importable in the newest release; no
`StorageMeta`, which 2.0 to 2.3 lack; no path objects. Attributes that newer classes have and the
pickle lacks fall back to the defaults that their classes carry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from shardkeep.format.pickling import FALSE, NONE, Pickle, integer, mapping, new, sequence
from shardkeep.types import DTYPES, I64, Index, Path

__all__ = ["dcp_path", "metadata_bytes"]

_METADATA = "torch.distributed.checkpoint.metadata"
_LEGACY = "torch.distributed._shard.sharded_tensor.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"

Ints = tuple[int, ...]


def metadata_bytes(index: Index) -> bytes:
    """The pickle, STOP byte included.

    Tensors come first, then objects, in the order of the index, and twins last: torch's converter
    (`dcp_to_torch_save`) fills containers in this order, and a twin must not hide its leaves.
    """
    out = _Writer(index)
    state = mapping(
        (
            out.text("state_dict_metadata"),
            mapping(out.entries()),
            out.text("planner_data"),
            mapping(out.paths()),
            out.text("storage_data"),
            mapping(out.places()),
        )
    )
    return out.pickle.finish(new(out.pickle.named(_METADATA, "Metadata"), state))


def dcp_path(path: Path, containers: Mapping[Path, str]) -> tuple[int | str, ...]:
    """A path as DCP has it: positions in lists are ints, and the keys of mappings strings."""
    return tuple(
        key if containers.get(path[:depth]) == "list" and type(key) is int else str(key)
        for depth, key in enumerate(path)
    )


class _Writer:
    """Writes the three mappings of a `Metadata`."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.pickle = Pickle()
        self.text = self.pickle.text
        self._sizes: dict[Ints, bytes] = {}
        self._size = self.pickle.named("torch", "Size")
        ndim = index.tensors.ndim
        self._shapes = self._rows(index.tensors.shape, ndim)
        chunk_ndim = ndim[index.chunks.tensor]
        self._offsets = self._rows(index.chunks.offsets, chunk_ndim)
        self._extents = self._rows(index.chunks.sizes, chunk_ndim)
        self._chunks = _stored(index, self._offsets)
        ordinary = [name for name in index.objects.names if name not in index.twins]
        self._objects = [*ordinary, *index.twins]

    def _rows(self, table: I64, ndim: NDArray[np.uint8]) -> list[bytes]:
        """What pushes each row of a padded table, as a `torch.Size`."""
        known, rows = self._sizes, []
        for padded, length in zip(table.tolist(), ndim.tolist(), strict=True):
            row = tuple(padded[:length])
            push = known.get(row)
            if push is None:
                numbers = sequence([integer(size) for size in row])
                push = known[row] = self.pickle.constant(self._size + numbers + b"\x85R")
            rows.append(push)
        return rows

    def entries(self) -> Iterator[bytes]:
        """Name and entry of everything: `state_dict_metadata`."""
        text, pickle, offsets, extents = self.text, self.pickle, self._offsets, self._extents
        kind = pickle.named(_METADATA, "TensorStorageMetadata")
        before = b"%b)\x81}(%b" % (kind, text("properties"))
        shape_key, chunks_key = text("size"), text("chunks")
        chunk = pickle.named(_METADATA, "ChunkStorageMetadata")
        chunk_before = b"%b)\x81}(%b" % (chunk, text("offsets"))
        sizes_key = text("sizes")
        properties = self._properties()
        codes = self.index.tensors.dtype.tolist()
        for name, code, shape, rows in zip(
            self.index.tensors.names, codes, self._shapes, self._chunks, strict=True
        ):
            chunks = [
                b"%b%b%b%bub" % (chunk_before, offsets[row], sizes_key, extents[row])
                for row in rows
            ]
            yield b"%b%b%b%b%b%b](%beub" % (
                text(name),
                before,
                properties[code],
                shape_key,
                shape,
                chunks_key,
                b"".join(chunks),
            )
        entry = pickle.named(_METADATA, "BytesStorageMetadata") + b")\x81"
        for name in self._objects:
            yield text(name) + entry

    def _properties(self) -> dict[int, bytes]:
        """For each dtype code in use, a `TensorProperties`, shared by all tensors of the dtype."""
        pickle = self.pickle
        kind = pickle.named(_LEGACY, "TensorProperties")
        layout = pickle.named("torch.serialization", "_get_layout")
        layout = pickle.constant(layout + self.text("torch.strided") + b"\x85R")
        memory = pickle.named(_LEGACY, "MEM_FORMAT_ENCODING")
        memory = pickle.constant(memory + integer(0) + b"\x85R")  # contiguous
        return {
            code: pickle.constant(
                new(
                    kind,
                    sequence(
                        [pickle.named("torch", DTYPES[code].name), layout, FALSE, memory, FALSE]
                    ),
                )
            )
            for code in sorted(set(self.index.tensors.dtype.tolist()))
        }

    def paths(self) -> Iterator[bytes]:
        """Name and path of everything: `planner_data`."""
        text = self.text
        push = self._path_pusher()
        leaves = self.index.structure.leaves if self.index.structure else {}
        twins = self.index.twins
        for name in (*self.index.tensors.names, *self._objects):
            path = twins.get(name) or leaves.get(name) or (name,)
            yield text(name) + push(path)

    def _path_pusher(self) -> Callable[[Path], bytes]:
        text = self.text
        containers = self.index.structure.containers if self.index.structure else {}
        parents: dict[Path, tuple[bool, list[bytes]]] = {(): (containers.get(()) == "list", [])}

        def inside(parent: Path) -> tuple[bool, list[bytes]]:
            """Whether it is a list, and what pushes the parts of its path."""
            known = parents.get(parent)
            if known is None:
                known = containers.get(parent) == "list", parts(parent)
                parents[parent] = known
            return known

        def parts(path: Path) -> list[bytes]:
            in_list, outer = inside(path[:-1])
            key = path[-1]
            return [*outer, integer(key) if in_list and type(key) is int else text(str(key))]

        return lambda path: sequence(parts(path))

    def places(self) -> Iterator[bytes]:
        """Key and place of every item: `storage_data`."""
        text, pickle, index, offsets = self.text, self.pickle, self.index, self._offsets
        place = self._placer()
        kind = pickle.named(_METADATA, "MetadataIndex")
        before = b"%b)\x81}(%b" % (kind, text("fqn"))
        hint_key, offset_key = text("index"), text("offset")
        chunks = index.chunks
        columns = (chunks.file, chunks.item, chunks.length, chunks.transform)
        items = list(zip(*(column.tolist() for column in columns), strict=True))
        for name, rows in zip(index.tensors.names, self._chunks, strict=True):
            for hint, row in enumerate(rows):
                yield b"%b%b%b%b%b%bub%b" % (
                    before,
                    text(name),
                    hint_key,
                    integer(hint),
                    offset_key,
                    offsets[row],
                    place(*items[row]),
                )
        objects = index.objects
        columns = (objects.file, objects.item, objects.length, objects.transform)
        items = list(zip(*(column.tolist() for column in columns), strict=True))
        rows_by_name = {name: row for row, name in enumerate(objects.names)}
        nothing = hint_key + NONE + offset_key + NONE + b"ub"
        for name in self._objects:
            yield before + text(name) + nothing + place(*items[rows_by_name[name]])

    def _placer(self) -> Callable[[int, int, int, int], bytes]:
        text, pickle = self.text, self.pickle
        kind = pickle.named(_FILESYSTEM, "_StorageInfo")
        before = b"%b)\x81}(%b" % (kind, text("relative_path"))
        files = [text(file) for file in self.index.files]
        offset_key, length_key = text("offset"), text("length")
        transforms = [b""] + [
            text("transform_descriptors") + b"](%be" % b"".join(map(text, names))
            for names in self.index.transforms[1:]
        ]

        def place(file: int, offset: int, length: int, transform: int) -> bytes:
            return b"%b%b%b%b%b%b%bub" % (
                before,
                files[file],
                offset_key,
                integer(offset),
                length_key,
                integer(length),
                transforms[transform],
            )

        return place


def _stored(index: Index, offsets: Sequence[bytes]) -> list[Sequence[int]]:
    """For each tensor the rows of its chunks.

    DCP knows an item by name and offset alone. Of several chunks of a tensor at one offset, the
    first that has elements is kept: an empty one there would hide the bytes of the others.
    """
    empty = (index.chunks.sizes == 0).any(axis=1).tolist()
    counts = np.bincount(index.chunks.tensor, minlength=len(index.tensors.names))
    stored: list[Sequence[int]] = []
    start = 0
    for count in counts.tolist():
        rows: Sequence[int] = range(start, start + count)
        if count > 1:
            kept: dict[bytes, int] = {}
            for row in rows:
                other = kept.get(offsets[row])
                if other is None or (empty[other] and not empty[row]):
                    kept[offsets[row]] = row
            rows = list(kept.values())
        stored.append(rows)
        start += count
    return stored
