"""Locations of chunks in data files, from the index or from the header of a chunk's item."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import numpy as np
from numpy.typing import NDArray

from shardkeep import settings
from shardkeep.errors import Damaged, FormatError, ShardkeepError
from shardkeep.format.dcp import transforms
from shardkeep.format.torch_zip import container
from shardkeep.io.checksums import crc32
from shardkeep.io.read.ranges import MergedRead, WantedRange, describe_mismatch, merge_ranges
from shardkeep.plan.reads import ChunkSource
from shardkeep.settings import BLOCK
from shardkeep.stores.contract import Store
from shardkeep.types import DTYPES, I64, ITEMSIZES, ByteRange, DType, Index

__all__ = ["ChunkLocations", "PlainChunks", "inside", "read_range", "unpacked_limit", "window"]

_SMALL_ITEM_BYTES = 64 * 1024
"""Items of at most this many bytes are read whole when their header is needed."""

_MERGED_READ_BYTES = 1 << 20
"""Maximum number of bytes that one read of several small items covers."""

_EDGE_BYTES = 4096
"""Bytes read at either end of a larger item, for its header and its directory."""

_MAX_EXPANSION_BYTES = 64 << 20
"""Bytes by which a tensor may exceed its stored bytes (a tensor made by `expand` does)."""

_CARRIERS = {"uint16": "int16", "uint32": "int32", "uint64": "int64"}
"""Dtypes that Shardkeep's items store as another dtype of the same width (`container_write`)."""

_MAX_UNPACKED_BYTES = 32 << 20
_MAX_UNPACKED_RATIO = 64
"""An unpacked object may have this many bytes, or this many times its stored bytes."""

_ITEM_OVERHEAD_BYTES = 1 << 20
"""Bytes that an unpacked item may have beyond its tensor: header, directory, padding."""


@dataclass(frozen=True, slots=True, eq=False)
class PlainChunks:
    """K chunks that are read whole, without a `ChunkSource`: their elements are stored in C order.

    Attributes:
        start: [K] offset of the first byte in the file; -1 for a chunk that needs a `ChunkSource`.
        nbytes: [K] number of bytes of the elements, where `start` is not -1.
        crc: [K] CRC-32 of these bytes; -1 where it is not known.
    """

    start: I64
    nbytes: I64
    crc: I64

    def take(self, rows: I64) -> PlainChunks:
        """Return the given rows, in the given order."""
        return PlainChunks(self.start[rows], self.nbytes[rows], self.crc[rows])


class ChunkLocations:
    """Sources of the chunks of one checkpoint, by their row in `Index.chunks`."""

    def __init__(self, store: Store, index: Index) -> None:
        self.store = store
        self.index = index
        self._known: dict[int, ChunkSource] = {}
        self._alike: container.Known = {}
        self._size = lru_cache(maxsize=None)(lambda file: store.head(file).size)

    def locate(self, rows: Iterable[int], *, threads: int | None = None) -> dict[int, ChunkSource]:
        """Return the sources of chunks; read item headers where the index is not sufficient.

        Raises:
            Damaged: an item extends beyond the end of its file, or the file is missing.
            FormatError: an item's header contradicts the index.
        """
        wanted = list(rows)
        unknown = [row for row in wanted if row not in self._known]
        asked = [row for row in unknown if self.index.chunks.payload[row] < 0]
        headers = (
            self._locate_by_headers(asked, threads or settings.read_threads()) if asked else {}
        )
        for row in unknown:
            found = headers[row] if row in headers else self._locate(row)
            if isinstance(found, ShardkeepError):
                raise found
            self._known[row] = found
        return {row: self._known[row] for row in wanted}

    def _locate_by_headers(
        self, rows: list[int], threads: int
    ) -> dict[int, ChunkSource | ShardkeepError]:
        """Return the sources of chunks from the headers of their items, or the error of each.

        Small items that are near one another are read together.
        """
        wants = [
            WantedRange(item.file, item.offset, item.offset + item.length, row)
            for row, item in zip(rows, map(self.item, rows), strict=True)
        ]
        small = [want for want in wants if want.high - want.low <= _SMALL_ITEM_BYTES]
        reads = list(merge_ranges(small, settings.read_gap_bytes(), _MERGED_READ_BYTES))
        reads += [
            MergedRead(*want[:3], [want])
            for want in wants
            if want.high - want.low > _SMALL_ITEM_BYTES
        ]
        found: dict[int, ChunkSource | ShardkeepError] = {}
        with ThreadPoolExecutor(threads) as pool:
            for some in pool.map(self._read_headers, reads):
                found |= some
        return found

    def _read_headers(self, read: MergedRead) -> dict[int, ChunkSource | ShardkeepError]:
        data = b""
        if len(read.wants) > 1 and 0 <= read.low < read.high <= self._size_or_none(read.file):
            with suppress(OSError):  # each item is then read alone, which reports the error
                data = self.store.get_range(read.file, read.low, read.high - read.low)
        found: dict[int, ChunkSource | ShardkeepError] = {}
        for _, low, high, row in read.wants:
            item = data[low - read.low : high - read.low]
            try:
                found[row] = self._locate(row, item if len(item) == high - low else None)
            except ShardkeepError as error:
                found[row] = error
        return found

    def plain(self, rows: I64, *, limit: int, threads: int | None = None) -> PlainChunks:
        """Return the locations of small, plain chunks, and locate all others as `locate` does.

        Args:
            rows: rows of chunks, in ascending order.
            limit: maximum number of bytes of a small chunk, at most `BLOCK`.
            threads: number of threads that read item headers.

        Raises:
            Damaged: an item extends beyond the end of its file, or the file is missing.
            FormatError: an item's header contradicts the index.
        """
        chunks, tensors = self.index.chunks, self.index.tensors
        itemsize = ITEMSIZES[tensors.dtype[chunks.tensor[rows]]]
        # In floating point, because the product of a hostile shape could overflow an integer.
        rough = chunks.sizes[rows].prod(axis=1, dtype=np.float64) * itemsize
        small = rough <= limit
        nbytes = np.where(small, rough, -1).astype(np.int64)
        checksums = chunks.block[rows + 1] - chunks.block[rows]
        small &= checksums <= 1
        crc = np.full(len(rows), -1, dtype=np.int64)
        crc[checksums == 1] = chunks.checksums[chunks.block[rows[checksums == 1]]]
        start = np.where(small & self._located_by_index(rows, nbytes), chunks.payload[rows], -1)
        doubtful = np.flatnonzero(start < 0)
        found = self.locate(rows[doubtful].tolist(), threads=threads)
        for k in doubtful[small[doubtful]].tolist():
            if _is_plain(source := found[int(rows[k])]):
                start[k] = source.start
                crc[k] = -1 if source.checksums is None else source.checksums[0]
        return PlainChunks(start, nbytes, crc)

    def _located_by_index(self, rows: I64, nbytes: I64) -> NDArray[np.bool_]:
        """Return for each chunk whether the index locates its payload inside its item and file.

        The result is False where `nbytes` is negative.
        """
        chunks = self.index.chunks
        files, place = np.unique(chunks.file[rows], return_inverse=True)
        sizes = np.array([self._size_or_none(self.index.files[file]) for file in files], np.int64)
        item, length, inside = chunks.item[rows], chunks.length[rows], chunks.payload[rows]
        there = (item >= 0) & (length >= 0) & (item <= sizes[place] - length)
        inside = inside - item
        simple: NDArray[np.bool_] = there & (inside >= 0) & (inside <= length - nbytes)
        return simple & (chunks.payload[rows] >= 0) & (nbytes >= 0)

    def _size_or_none(self, file: str) -> int:
        try:
            return self._size(file)
        except FileNotFoundError:
            return -1

    def name(self, row: int) -> str:
        """Return the name of the tensor that a chunk belongs to."""
        return self.index.tensors.names[int(self.index.chunks.tensor[row])]

    def nbytes(self, row: int) -> int:
        """Return the number of bytes of a chunk's elements."""
        chunks = self.index.chunks
        dtype = DTYPES[self.index.tensors.dtype[int(chunks.tensor[row])]]
        nbytes: int = prod(chunks.sizes[row].tolist()) * dtype.itemsize
        return nbytes

    def item(self, row: int) -> ByteRange:
        """Return the range of a chunk's item."""
        chunks = self.index.chunks
        file = self.index.files[int(chunks.file[row])]
        return ByteRange(file, int(chunks.item[row]), int(chunks.length[row]))

    def bare(self, row: int, data: bytes | None = None) -> bool:
        """Return whether a chunk's item consists of its elements alone, as in a safetensors file.

        Args:
            row: row of the chunk.
            data: the bytes of its item, if they have already been read.
        """
        item = self.item(row)
        if self.index.chunks.transform[row] or item.length != self.nbytes(row):
            return False
        # The container of a tensor with repeated elements may have the same length by chance.
        if data is None:
            begin = ByteRange(item.file, item.offset, min(4, item.length))
            data = read_range(self.store, begin, self.name(row))
        return data[:4] != b"PK\x03\x04"

    def object(self, row: int) -> ByteRange:
        """Return the range of an object's item, by its row in `Index.objects`."""
        objects = self.index.objects
        file = self.index.files[int(objects.file[row])]
        return ByteRange(file, int(objects.item[row]), int(objects.length[row]))

    def _locate(self, row: int, data: bytes | None = None) -> ChunkSource:
        """Return the source of a chunk; `data` is its item, if that has already been read."""
        chunks, item, name = self.index.chunks, self.item(row), self.name(row)
        tensor = int(chunks.tensor[row])
        dtype = DTYPES[self.index.tensors.dtype[tensor]]
        sizes = tuple(chunks.sizes[row, : self.index.tensors.ndim[tensor]].tolist())
        self._check_inside(item, name)
        if chunks.payload[row] >= 0:
            return self._from_index(row, item, dtype, sizes, int(chunks.payload[row]))
        if self.bare(row, data):
            return self._from_index(row, item, dtype, sizes, item.offset)
        undo = self.index.transforms[int(chunks.transform[row])]
        if not undo:
            read_at = window(self.store, item, name, data)
            stored = container.tensor(
                read_at, item.length, file=item.file, place=name, known=self._alike
            )
            source = _source(stored, item, dtype, sizes, name)
            if stored.conj or stored.neg:
                record = read_at(stored.record.offset, stored.record.nbytes)
                return _resolved(stored, source, record, name)
            return _checksummed(source)
        limit = unpacked_limit(item.length, prod(sizes) * dtype.itemsize)
        packed = read_range(self.store, item, name) if data is None else data
        data = transforms.undo(packed, undo, limit=limit, file=item.file, place=name)
        stored = container.tensor(inside(data), len(data), file=item.file, place=name)
        unpacked = ByteRange(item.file, 0, len(data))
        source = _source(stored, unpacked, dtype, sizes, name, data=memoryview(data))
        first = stored.record.offset
        record = data[first : first + stored.record.nbytes]
        if stored.conj or stored.neg:
            return _resolved(stored, source, record, name)
        checksums = self._checksums(row)
        if checksums is None:
            _check_record(stored, source, record, name)
        return replace(source, checksums=checksums)

    def _check_inside(self, item: ByteRange, name: str) -> None:
        try:
            size = self._size(item.file)
        except FileNotFoundError:
            raise Damaged("the file is missing", file=item.file, name=name) from None
        if item.offset + item.length > size:
            raise Damaged(
                f"bytes {item.offset} to {item.offset + item.length} are wanted, "
                f"but the file ends at {size}",
                file=item.file,
                name=name,
            )

    def _from_index(
        self, row: int, item: ByteRange, dtype: DType, sizes: tuple[int, ...], start: int
    ) -> ChunkSource:
        nbytes = prod(sizes) * dtype.itemsize
        if start < item.offset or start + nbytes > item.offset + item.length:
            place = f"tensor {self.name(row)!r}"
            raise FormatError("its payload extends beyond its item", file=item.file, place=place)
        return ChunkSource(
            file=item.file,
            start=start,
            strides=_c_strides(sizes, dtype.itemsize),
            sizes=sizes,
            itemsize=dtype.itemsize,
            payload=(start, nbytes),
            checksums=self._checksums(row),
            data=None,
        )

    def _checksums(self, row: int) -> NDArray[np.uint32] | None:
        chunks = self.index.chunks
        first, last = int(chunks.block[row]), int(chunks.block[row + 1])
        return chunks.checksums[first:last] if last > first else None


def _source(
    stored: container.StoredTensor,
    item: ByteRange,
    dtype: DType,
    sizes: tuple[int, ...],
    name: str,
    *,
    data: memoryview | None = None,
) -> ChunkSource:
    """Return a source from the header of an item, which must agree with the index."""
    place = f"tensor {name!r}"
    if stored.dtype.name not in (dtype.name, _CARRIERS.get(dtype.name)) or stored.shape != sizes:
        raise FormatError(
            f"the metadata says {dtype}{list(sizes)}, "
            f"but its item holds {stored.dtype}{list(stored.shape)}",
            file=item.file,
            place=place,
        )
    nbytes = prod(sizes) * dtype.itemsize
    if nbytes > stored.record.nbytes + _MAX_EXPANSION_BYTES:
        raise FormatError(
            f"a tensor of {nbytes} bytes cannot be stored in {stored.record.nbytes} bytes",
            file=item.file,
            place=place,
        )
    return ChunkSource(
        file=item.file,
        start=item.offset + stored.start,
        strides=tuple(stride * dtype.itemsize for stride in stored.strides),
        sizes=sizes,
        itemsize=dtype.itemsize,
        payload=(item.offset + stored.record.offset, stored.record.nbytes),
        checksums=None,
        data=data,
        crc=stored.record.crc32,
    )


def _checksummed(source: ChunkSource) -> ChunkSource:
    """Use the CRC-32 of a payload of at most one block as the checksum of that block."""
    if source.crc is None or not 0 < source.payload[1] <= BLOCK:
        return source
    return replace(source, checksums=np.array([source.crc], dtype=np.uint32))


def _check_record(
    stored: container.StoredTensor, source: ChunkSource, record: bytes, name: str
) -> None:
    """Compare the bytes of a record with its CRC-32; raise `Damaged` if they differ."""
    found = crc32(record)
    if found != stored.record.crc32:
        raise Damaged(describe_mismatch(found, stored.record.crc32), file=source.file, name=name)


def _resolved(
    stored: container.StoredTensor, source: ChunkSource, record: bytes, name: str
) -> ChunkSource:
    """Return an in-memory source for elements that are stored conjugated or negated.

    The elements are resolved to the values that they stand for.
    """
    _check_record(stored, source, record, name)
    array = container.array(stored, memoryview(record))
    data = memoryview(array.tobytes())
    strides = _c_strides(source.sizes, source.itemsize)
    return replace(source, start=0, strides=strides, payload=(0, len(data)), data=data)


def _is_plain(source: ChunkSource) -> bool:
    """Return whether a small chunk is stored in C order, with a checksum of exactly its elements.

    A chunk without block checksums qualifies, too, if its elements are inside its payload.
    """
    if source.data is not None or source.strides != _c_strides(source.sizes, source.itemsize):
        return False
    first, nbytes = source.payload
    wanted = prod(source.sizes) * source.itemsize
    if source.checksums is None:
        return first <= source.start and source.start + wanted <= first + nbytes
    return (source.start, wanted) == (first, nbytes) and len(source.checksums) == 1


def _c_strides(sizes: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides: list[int] = []
    step = itemsize
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def unpacked_limit(packed: int, nbytes: int | None = None) -> int:
    """Return the maximum number of bytes that an item may have after its transforms are undone.

    Args:
        packed: number of bytes of the item.
        nbytes: number of bytes of its tensor; None for an object, whose size is not recorded. The
            limit keeps a small hostile item from filling the memory.
    """
    return (
        max(_MAX_UNPACKED_BYTES, _MAX_UNPACKED_RATIO * packed)
        if nbytes is None
        else nbytes + _ITEM_OVERHEAD_BYTES
    )


def inside(data: bytes) -> Callable[[int, int], bytes]:
    """Return a function that reads parts of an item that is in memory."""
    return lambda offset, length: data[offset : offset + length]


def window(
    store: Store, item: ByteRange, name: str, whole: bytes | None = None
) -> Callable[[int, int], bytes]:
    """Return a function that reads parts of an item, relative to its start.

    A small item is read whole, and short parts at the ends of a larger one are read together.

    Args:
        store: the checkpoint.
        item: range of the item.
        name: name of the tensor or object, for errors.
        whole: the bytes of the item, if they have already been read.

    Raises:
        Damaged: a small item is missing or shorter than its range. The function raises this, too.
    """
    if whole is None and item.length <= _SMALL_ITEM_BYTES:
        whole = read_range(store, item, name)

    @lru_cache(maxsize=4)
    def edge(start: int) -> bytes:
        return read_range(store, ByteRange(item.file, item.offset + start, _EDGE_BYTES), name)

    def read_at(offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > item.length:
            raise FormatError("a record extends beyond its item", file=item.file, place=name)
        if whole is not None:
            return whole[offset : offset + length]
        for start in (0, item.length - _EDGE_BYTES):
            if start <= offset and offset + length <= start + _EDGE_BYTES:
                return edge(start)[offset - start : offset - start + length]
        return read_range(store, ByteRange(item.file, item.offset + offset, length), name)

    return read_at


def read_range(store: Store, where: ByteRange, name: str) -> bytes:
    """Return all bytes of a range.

    Raises:
        Damaged: the file is missing, or it ends before the range does.
    """
    try:
        data = store.get_range(where.file, where.offset, where.length)
    except FileNotFoundError:
        raise Damaged("the file is missing", file=where.file, name=name) from None
    if len(data) < where.length:
        raise Damaged(
            f"expected {where.length} bytes at offset {where.offset}, found {len(data)}",
            file=where.file,
            name=name,
        )
    return data
