"""The bytes of a manifest as an index, by range. The layout is `manifest_layout`'s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.errors import FormatError
from shardkeep.format.archive import Archive, ReadAt
from shardkeep.format.manifest_layout import FORMAT, KINDS, VERSION, LazyValues, too_long
from shardkeep.format.manifest_write import write_manifest
from shardkeep.format.names import safe_file_name
from shardkeep.format.values import CORE_MAKERS, Json, Maker, decode, decode_key
from shardkeep.knobs import BLOCK
from shardkeep.types import (
    DTYPES,
    I64,
    MAX_DIMS,
    Chunks,
    DType,
    Index,
    Objects,
    Path,
    Structure,
    Tensors,
)

__all__ = ["Outline", "read_manifest", "read_outline", "write_manifest"]

_MAX_BYTES = 2.0**62
"""Bytes of a tensor at most, so that no sum of offsets and sizes overflows."""
_MAX_ROWS = 2**40
_ITEMSIZES = np.array([dtype.itemsize for dtype in DTYPES], np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """What a listing needs: an `Index` without its chunks.

    Attributes:
        counts: [N] chunks of each tensor.
        header: what `write_manifest` was given.
        others: see `Index`.
    """

    files: tuple[str, ...]
    tensors: Tensors
    counts: I64
    objects: Objects
    transforms: tuple[tuple[str, ...], ...]
    structure: Structure | None
    twins: Mapping[str, Path]
    extra: Mapping[str, Any]
    header: Mapping[str, Any]
    _reader: _Reader = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return int(_bytes(self.tensors).sum(dtype=object))

    def index(self) -> Index:
        """The whole index: reads the columns of the chunks. Raises as `read_manifest` does."""
        chunks = self._reader.chunks(self)
        return Index(
            self.files,
            self.tensors,
            chunks,
            self.objects,
            self.transforms,
            self.structure,
            self.twins,
            self.extra,
        )


def read_outline(
    read_at: ReadAt,
    size: int,
    *,
    file: str,
    save_id: str | None = None,
    make: Mapping[str, Maker] = CORE_MAKERS,
) -> Outline:
    """The outline of a manifest, from the end of its file.

    Args:
        read_at: reads bytes of the manifest.
        size: bytes of the manifest.
        file: its name, for errors.
        save_id: the save that it must belong to, if that is known.
        make: makers of torch's values, see `values.CORE_MAKERS`.

    Raises:
        FormatError: its structure is broken or hostile, or it belongs to another save.
        Damaged: a member does not match its checksum.
    """
    return _Reader(Archive(read_at, size, file=file), file, make).outline(save_id)


def read_manifest(
    read_at: ReadAt,
    size: int,
    *,
    file: str,
    save_id: str | None = None,
    make: Mapping[str, Maker] = CORE_MAKERS,
) -> Index:
    """The index that `write_manifest` was given. Arguments and errors are `read_outline`'s."""
    return read_outline(read_at, size, file=file, save_id=save_id, make=make).index()


class _Reader:
    """Reads the columns, checks each one, and names the member that is wrong."""

    def __init__(self, archive: Archive, file: str, make: Mapping[str, Maker]) -> None:
        self._archive, self._file, self._make = archive, file, make
        self._head: dict[str, Json] = {}

    def outline(self, save_id: str | None) -> Outline:
        self._head = self._header(save_id)
        header, extra = self._mapping("header"), self._mapping("extra")
        found = header.get("save_id")
        if save_id is not None and found != save_id:
            self._refuse("header.json", f"belongs to save {found!r:.80}, not {save_id!r}")
        names = self._names()
        count = self._count("tensors")
        tensors = self._tensors(names[:count])
        counts = self._archive.column("tensors.chunks", count)
        self._within("tensors.chunks", counts, 0, self._count("chunks"))
        if counts.sum() != self._count("chunks"):
            self._refuse("tensors.chunks.npy", "does not count all chunks")
        files = tuple(safe_file_name(self._text(n), file=self._file) for n in self._list("files"))
        transforms = self._transforms()
        objects = self._objects(names[count:], len(files), len(transforms))
        return Outline(
            files,
            tensors,
            counts,
            objects,
            transforms,
            self._structure(names),
            self._twins(objects.names),
            extra,
            header,
            self,
        )

    def chunks(self, outline: Outline) -> Chunks:
        """The chunks, in full."""
        count, tensors, column = self._count("chunks"), outline.tensors, self._archive.column
        dims = tensors.shape.shape[1]
        tensor = np.repeat(np.arange(len(tensors.names)), outline.counts)
        offsets = column("chunks.offsets", count, dims)
        sizes = column("chunks.sizes", count, dims)
        shape = tensors.shape[tensor]
        inside = (offsets >= 0) & (sizes >= 0) & (sizes <= shape) & (offsets <= shape - sizes)
        padding = np.arange(dims) >= tensors.ndim[tensor][:, None]
        if not inside.all() or (sizes[padding] != 1).any():
            self._refuse("chunks.sizes.npy", "holds a box outside its tensor")
        length, gap = column("chunks.length", count), column("chunks.gap", count)
        # Sums wrap around, in writing as in reading; what is left of them is checked below.
        item = np.cumsum(gap + np.concatenate([np.zeros(1, np.int64), length[:-1]])[:count])
        file, transform = self._places("chunks", count, item, length, outline)
        nbytes = sizes.prod(axis=1) * _ITEMSIZES[tensors.dtype][tensor]
        payload = column("chunks.payload", count)
        known = payload >= 0
        if (known & ((nbytes > length) | (payload > length - nbytes))).any() or (payload < -1).any():
            self._refuse("chunks.payload.npy", "holds a payload outside its item")
        blocks, digests = column("chunks.blocks", count), self._count("digests")
        if ((blocks != 0) & (blocks != -(-nbytes // BLOCK))).any() or blocks.sum() != digests:
            self._refuse("chunks.blocks.npy", "does not fit the payloads or the digests")
        return Chunks(
            tensor,
            offsets,
            sizes,
            file,
            item,
            length,
            np.where(known, item + payload, -1),
            transform,
            np.concatenate([np.zeros(1, np.int64), np.cumsum(blocks)]),
            column("chunks.digests", digests, dtype=np.uint32),
        )

    def _header(self, save_id: str | None) -> dict[str, Json]:
        head = self._archive.json("header")
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            self._refuse("header.json", "is not the header of a manifest")
        if head.get("version") != VERSION:
            what = f"version {head.get('version')!r:.20} is not known; a newer Shardkeep wrote it"
            self._refuse("header.json", what)
        return head

    def _names(self) -> list[str]:
        count = self._count("tensors") + self._count("objects")
        names = []
        for name in self._texts("names", count):
            try:
                names.append(name.decode("utf-8", "surrogatepass"))
            except UnicodeDecodeError:
                self._refuse("names.npy", "is not valid UTF-8")
        if len(set(names)) != count:
            self._refuse("names.npy", "holds a name twice")
        return names

    def _texts(self, name: str, count: int) -> list[bytes]:
        size = self._count(name)
        lengths = self._archive.column(f"{name}.lengths", count)
        self._within(f"{name}.lengths", lengths, 0, size)
        ends = np.cumsum(lengths)
        if (ends[-1] if count else 0) != size or (np.diff(ends) < 0).any():
            self._refuse(f"{name}.lengths.npy", f"does not sum up to {size} bytes")
        blob, ends = self._archive.blob(name, size), ends.tolist()
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
        if (np.maximum(shape, 1).prod(axis=1, dtype=np.float64) * 16 > _MAX_BYTES).any():
            self._refuse("tensors.shape.npy", "holds a tensor of more than 2**62 bytes")
        return tensors

    def _objects(self, names: list[str], files: int, transforms: int) -> Objects:
        raise NotImplementedError
