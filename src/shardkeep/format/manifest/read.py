"""Reads a manifest as an index, by range. See `manifest.layout` for the layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from shardkeep.errors import FormatError
from shardkeep.format.manifest.archive import Archive, ReadAt
from shardkeep.format.manifest.layout import FORMAT, KINDS, VERSION, LazyValues, too_long
from shardkeep.format.manifest.write import write_manifest
from shardkeep.format.names import safe_file_name
from shardkeep.format.values import Json, decode, decode_key, unique_keys
from shardkeep.settings import BLOCK
from shardkeep.types import (
    I64,
    ITEMSIZES,
    MAX_DIMS,
    Chunks,
    DType,
    Index,
    Objects,
    Path,
    Structure,
    Tensors,
)

__all__ = [
    "Outline",
    "read_files",
    "read_header",
    "read_manifest",
    "read_outline",
    "write_manifest",
]

_MAX_BYTES = 2.0**62
"""Maximum bytes of a tensor, so that no sum of offsets and sizes overflows."""
_MAX_ROWS = 2**40


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """An `Index` without its chunks, as a listing needs it.

    Attributes:
        counts: [N] chunks of each tensor.
        header: the header that `write_manifest` was given.
        others: see `Index`.
    """

    files: tuple[str, ...]
    tensors: Tensors
    counts: I64
    objects: Objects
    transforms: tuple[tuple[str, ...], ...]
    structure: Structure | None
    legacy_duplicates: Mapping[str, Path]
    extra: Mapping[str, Any]
    header: Mapping[str, Any]
    _reader: _Reader = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return int(_bytes(self.tensors).sum(dtype=object))

    def index(self) -> Index:
        """Return the whole index, reading the chunks' columns; raise as `read_manifest`."""
        chunks = self._reader.chunks(self)
        return Index(
            self.files,
            self.tensors,
            chunks,
            self.objects,
            self.transforms,
            self.structure,
            self.legacy_duplicates,
            self.extra,
        )


def read_outline(
    read_at: ReadAt,
    size: int,
    *,
    file: str,
    save_id: str | None = None,
) -> Outline:
    """Return the outline of a manifest, from the end of its file.

    Args:
        read_at: reads bytes of the manifest.
        size: bytes of the manifest.
        file: its name, for errors.
        save_id: the save that it must belong to, if known.

    Raises:
        FormatError: its structure is invalid or hostile, or it belongs to another save.
        Damaged: a member does not match its checksum.
    """
    return _Reader(Archive(read_at, size, file=file), file).outline(save_id)


def read_manifest(
    read_at: ReadAt,
    size: int,
    *,
    file: str,
    save_id: str | None = None,
) -> Index:
    """Return the index of a manifest. Arguments and errors are those of `read_outline`."""
    return read_outline(read_at, size, file=file, save_id=save_id).index()


def read_header(
    read_at: ReadAt,
    size: int,
    *,
    file: str,
    save_id: str | None = None,
) -> Mapping[str, Any]:
    """Return only the header of a manifest. Arguments and errors are those of `read_outline`."""
    return _Reader(Archive(read_at, size, file=file), file).header(save_id)


def read_files(
    read_at: ReadAt,
    size: int,
    *,
    file: str,
    save_id: str | None = None,
) -> tuple[str, ...]:
    """Return the data files of a manifest. Arguments and errors are those of `read_outline`."""
    reader = _Reader(Archive(read_at, size, file=file), file)
    reader.header(save_id)
    return reader.files()


class _Reader:
    """Reads the columns, checks each one, and names the member that is wrong."""

    def __init__(self, archive: Archive, file: str) -> None:
        self._archive, self._file = archive, file
        self._head: dict[str, Json] = {}

    def header(self, save_id: str | None) -> Mapping[str, Any]:
        self._head = self._header()
        header = self._mapping("header")
        found = header.get("save_id")
        if save_id is not None and found != save_id:
            self._refuse("header.json", f"belongs to save {found!r:.80}, not {save_id!r}")
        return header

    def outline(self, save_id: str | None) -> Outline:
        header, extra = self.header(save_id), self._mapping("extra")
        names = self._names()
        count = self._count("tensors")
        tensors = self._tensors(names[:count])
        counts = self._archive.column("tensors.chunks", count)
        self._within("tensors.chunks", counts, 0, self._count("chunks"))
        if counts.sum() != self._count("chunks"):
            self._refuse("tensors.chunks.npy", "does not count all chunks")
        files, transforms = self.files(), self._transforms()
        objects = self._objects(names[count:], len(files), len(transforms))
        return Outline(
            files,
            tensors,
            counts,
            objects,
            transforms,
            self._structure(names),
            self._legacy_duplicates(objects.names),
            extra,
            header,
            self,
        )

    def files(self) -> tuple[str, ...]:
        """Return the data files, once the header has been read."""
        return tuple(safe_file_name(self._text(n), file=self._file) for n in self._list("files"))

    def chunks(self, outline: Outline) -> Chunks:
        """Return the chunks, in full."""
        count, tensors, column = self._count("chunks"), outline.tensors, self._archive.column
        dims = tensors.shape.shape[1]
        # Before anything is allocated for a number of rows, those rows have been read.
        length, gap = column("chunks.length", count), column("chunks.gap", count)
        tensor = np.repeat(np.arange(len(tensors.names)), outline.counts)
        offsets = column("chunks.offsets", count, dims)
        sizes = column("chunks.sizes", count, dims)
        shape = tensors.shape[tensor]
        inside = (offsets >= 0) & (sizes >= 0) & (sizes <= shape) & (offsets <= shape - sizes)
        padding = np.arange(dims) >= tensors.ndim[tensor][:, None]
        if not inside.all() or (sizes[padding] != 1).any():
            self._refuse("chunks.sizes.npy", "holds a box outside its tensor")
        # Sums wrap around, in writing as in reading; the results are checked below.
        item = np.cumsum(gap + np.concatenate([np.zeros(1, np.int64), length[:-1]])[:count])
        place = self._places("chunks", item, length, len(outline.files), len(outline.transforms))
        nbytes = sizes.prod(axis=1) * ITEMSIZES[tensors.dtype][tensor]
        payload = column("chunks.payload", count)
        known = payload >= 0
        if (known & ((nbytes > length) | (payload > length - nbytes))).any() or (
            payload < -1
        ).any():
            self._refuse("chunks.payload.npy", "holds a payload outside its item")
        blocks, checksums = column("chunks.blocks", count), self._count("digests")
        block = np.concatenate([np.zeros(1, np.int64), np.cumsum(blocks)])
        if ((blocks != 0) & (blocks != -(-nbytes // BLOCK))).any() or not _sums_to(
            block, checksums
        ):
            self._refuse("chunks.blocks.npy", "does not fit the payloads or the digests")
        return Chunks(
            tensor,
            offsets,
            sizes,
            place[0],
            item,
            length,
            np.where(known, item + payload, -1),
            place[1],
            block,
            column("chunks.digests", checksums, dtype=np.uint32),
        )

    def _header(self) -> dict[str, Json]:
        head = self._archive.json("header")
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            self._refuse("header.json", "is not the header of a manifest")
        if head.get("version") != VERSION:
            what = f"version {head.get('version')!r:.20} is not known; a newer Shardkeep wrote it"
            self._refuse("header.json", what)
        return head

    def _names(self) -> list[str]:
        count = self._count("tensors") + self._count("objects")
        blob, ends = self._blob("names", count)
        places = zip([0, *ends], ends, strict=False)
        if blob.isascii():  # Nearly always so: one decoding for all.
            text = blob.decode("ascii")
            names = [text[start:end] for start, end in places]
        else:
            names = [self._name(blob[start:end]) for start, end in places]
        if len(set(names)) != count:
            self._refuse("names.npy", "holds a name twice")
        return names

    def _name(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            self._refuse("names.npy", "is not valid UTF-8")

    def _blob(self, name: str, count: int) -> tuple[bytes, list[int]]:
        """Return a member of `count` texts, one after the other, and where each of them ends."""
        size = self._count(name)
        lengths = self._archive.column(f"{name}.lengths", count)
        self._within(f"{name}.lengths", lengths, 0, size)
        ends = np.cumsum(lengths)
        if not _sums_to(ends, size):
            self._refuse(f"{name}.lengths.npy", f"does not sum up to {size} bytes")
        return self._archive.blob(name, size), ends.tolist()

    def _texts(self, name: str, count: int) -> list[bytes]:
        blob, ends = self._blob(name, count)
        return [blob[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _tensors(self, names: list[str]) -> Tensors:
        count, dims, column = len(names), self._count("dims"), self._archive.column
        if dims > MAX_DIMS:
            self._refuse("header.json", f"has tensors of {dims} dimensions")
        try:
            codes = [DType.named(self._text(name)).code for name in self._list("dtypes")]
        except FormatError as error:
            raise error.within(file=self._file, place="header.json") from None
        rows = column("tensors.dtype", count)
        self._within("tensors.dtype", rows, 0, len(codes) - 1)
        ndim = column("tensors.ndim", count, dtype=np.uint8)
        shape = column("tensors.shape", count, dims)
        padding = np.arange(dims) >= ndim[:, None]
        if ndim.max(initial=0) != dims or (shape < 0).any() or (shape[padding] != 1).any():
            self._refuse("tensors.shape.npy", "does not fit the numbers of dimensions")
        tensors = Tensors(tuple(names), np.array(codes, np.uint8)[rows], ndim, shape)
        with np.errstate(over="ignore"):
            elements = np.maximum(shape, 1).prod(axis=1, dtype=np.float64)
        if (elements * ITEMSIZES.max() > _MAX_BYTES).any():
            self._refuse("tensors.shape.npy", "holds a tensor of more than 2**62 bytes")
        return tensors

    def _objects(self, names: list[str], files: int, transforms: int) -> Objects:
        count, column = len(names), self._archive.column
        item, length = column("objects.item", count), column("objects.length", count)
        file, transform = self._places("objects", item, length, files, transforms)
        crc = column("objects.crc", count)
        self._within("objects.crc", crc, -1, 2**32 - 1)
        texts = zip(names, self._texts("values", count), strict=True)
        values = LazyValues({name: text for name, text in texts if text}, self._file)
        return Objects(tuple(names), file, item, length, transform, crc, values)

    def _places(
        self, table: str, item: I64, length: I64, files: int, transforms: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int16]]:
        """Return files and transforms of items, after checking their locations."""
        if ((item < 0) | (length < 0) | (item > np.iinfo(np.int64).max - length)).any():
            self._refuse(f"{table}.length.npy", "holds an item outside every file")
        file = self._archive.column(f"{table}.file", len(item), dtype=np.int32)
        self._within(f"{table}.file", file, 0, files - 1)
        transform = self._archive.column(f"{table}.transform", len(item), dtype=np.int16)
        self._within(f"{table}.transform", transform, 0, transforms - 1)
        return file, transform

    def _transforms(self) -> tuple[tuple[str, ...], ...]:
        listed = self._list("transforms")
        if listed[:1] != [[]] or not all(isinstance(names, list) for names in listed):
            self._refuse("header.json", "does not list transforms")
        return tuple(tuple(map(self._text, names)) for names in listed)

    def _structure(self, names: list[str]) -> Structure | None:
        head = self._head.get("structure")
        if head is None:
            return None
        column = self._archive.column
        count = self._count("containers", head)
        leaf_count = self._count("leaves", head)
        kinds = column("containers.kind", count)
        self._within("containers.kind", kinds, 0, len(KINDS) - 1)
        if not count:
            self._refuse("containers.kind.npy", "has no root")
        parents = column("containers.parent", count - 1)
        self._within("containers.parent", parents, 0, np.arange(count - 1))
        leaf_parents = column("leaves.parent", leaf_count)
        self._within("leaves.parent", leaf_parents, 0, count - 1)
        depths = [0]
        for parent in parents.tolist():
            depths.append(depths[parent] + 1)
        if too_long(np.append(depths, np.array(depths)[leaf_parents] + 1)):
            self._refuse("containers.parent.npy", "nests too deeply")
        paths: list[Path] = [()]
        keys = self._keys()
        inner_keys = self._picked(keys, "containers", count - 1)
        for parent, key in zip(parents.tolist(), inner_keys.tolist(), strict=True):
            paths.append((*paths[parent], keys[key]))
        leaf_keys = self._picked(keys, "leaves", leaf_count)
        leaf_paths = [
            (*paths[parent], keys[key])
            for parent, key in zip(leaf_parents.tolist(), leaf_keys.tolist(), strict=True)
        ]
        rows = column("leaves.name", leaf_count)
        self._within("leaves.name", rows, 0, len(names) - 1)
        leaves = {names[row]: path for row, path in zip(rows.tolist(), leaf_paths, strict=True)}
        if len(leaves) != leaf_count:
            self._refuse("leaves.name.npy", "holds a name twice")
        if not _distinct(keys, (parents, inner_keys), (leaf_parents, leaf_keys)):
            try:
                unique_keys(paths)
                unique_keys(leaf_paths)
            except FormatError as error:
                raise error.within(file=self._file, place="keys.json") from None
        containers = (KINDS[kind] for kind in kinds.tolist())
        empties = self._empties(paths, leaf_count)
        return Structure(leaves, dict(zip(paths, containers, strict=True)), empties)

    def _empties(self, paths: list[Path], leaf_count: int) -> dict[Path, int]:
        count = self._count("empties", self._head["structure"])
        rows = self._archive.column("empties.container", count)
        self._within("empties.container", rows, 0, len(paths) - 1)
        before = self._archive.column("empties.before", count)
        self._within("empties.before", before, 0, leaf_count)
        return {paths[row]: n for row, n in zip(rows.tolist(), before.tolist(), strict=True)}

    def _keys(self) -> list[Any]:
        listed = self._archive.json("keys")
        if not isinstance(listed, list):
            self._refuse("keys.json", "is not a list")
        return [self._key(key, "keys.json") for key in listed]

    def _key(self, key: Json, member: str) -> Any:
        try:
            return decode_key(key)
        except FormatError as error:
            raise error.within(file=self._file, place=member) from None

    def _picked(self, keys: list[Any], table: str, count: int) -> I64:
        """Return [count] which of the keys is the last one of each path."""
        rows = self._archive.column(f"{table}.key", count)
        self._within(f"{table}.key", rows, 0, len(keys) - 1)
        return rows

    def _legacy_duplicates(self, names: tuple[str, ...]) -> dict[str, Path]:
        legacy_duplicates, known = {}, set(names)
        for pair in self._list("twins"):
            if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[1], list):
                self._refuse("header.json", "has an invalid list of legacy duplicates")
            name, path = self._text(pair[0]), tuple(self._key(k, "header.json") for k in pair[1])
            if name not in known or too_long(np.array([len(path)])):
                self._refuse("header.json", f"lists a duplicate {name!r:.80}, but no such object")
            legacy_duplicates[name] = path
        return legacy_duplicates

    def _list(self, name: str) -> list[Json]:
        value = self._head.get(name)
        if not isinstance(value, list):
            self._refuse("header.json", f"has no list {name!r}")
        return value

    def _mapping(self, name: str) -> Mapping[str, Any]:
        try:
            value = decode(self._head.get(name))
        except FormatError as error:
            raise error.within(file=self._file, place="header.json") from None
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            self._refuse("header.json", f"has no mapping {name!r}")
        return value

    def _text(self, value: Json) -> str:
        text = self._key(value, "header.json")
        if not isinstance(text, str):
            self._refuse("header.json", "holds something else in place of a text")
        return text

    def _count(self, name: str, head: Json = None) -> int:
        head = self._head if head is None else head
        value = head.get(name) if isinstance(head, dict) else None
        if type(value) is not int or not 0 <= value <= _MAX_ROWS:
            self._refuse("header.json", f"has no number of {name}")
        return value

    def _within(self, member: str, values: NDArray[Any], low: int, high: int | I64) -> None:
        if ((values < low) | (values > high)).any():
            self._refuse(f"{member}.npy", "holds a number out of range")

    def _refuse(self, place: str, what: str) -> NoReturn:
        raise FormatError(what, file=self._file, place=place)


def _distinct(keys: list[Any], *tables: tuple[I64, I64]) -> bool:
    """Return whether paths, as (container, key) in each table, are safe as keys of a dict.

    They are if no key occurs twice in a container and all keys are different strings: hashes of
    strings are salted, so nobody can make paths with equal hashes.
    """
    if not all(type(key) is str for key in keys) or len(set(keys)) < len(keys):
        return False
    pairs = (np.sort(parents * len(keys) + rows) for parents, rows in tables)
    return all((pair[1:] != pair[:-1]).all() for pair in pairs)


def _sums_to(sums: I64, total: int) -> bool:
    """Return whether running sums (of numbers from 0 to 2**62) end at `total`, not wrapped.

    A sum that has wrapped around was negative on the way: no step leads past all negative numbers
        at
    once. (The differences of the sums do not show it: they wrap around just the same.)
    """
    return (int(sums[-1]) if len(sums) else 0) == total and not (sums < 0).any()


def _bytes(tensors: Tensors) -> I64:
    """Return [N] bytes of each tensor."""
    return np.asarray(tensors.shape.prod(axis=1) * ITEMSIZES[tensors.dtype])
