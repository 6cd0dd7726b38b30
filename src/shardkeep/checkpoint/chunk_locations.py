"""Where the bytes of each chunk lie: from the index, or from the header of the chunk's item."""

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

_WHOLE = 64 * 1024
"""Items up to this many bytes are read in one piece when their header is asked for."""

_TOGETHER = 1 << 20
"""Bytes of the small items that are read at once."""

_EDGE = 4096
"""Bytes read at once from either end of a larger item: its header and its directory."""

_EXPANDED = 64 << 20
"""A tensor may take this many bytes more than are stored (an expanded one does), not more."""

_CARRIERS = {"uint16": "int16", "uint32": "int32", "uint64": "int64"}
"""Shardkeep's items hold these dtypes as others of the same bits (`format.container_write`)."""

_UNPACKED = 32 << 20
_RATIO = 64
"""An object may unpack to so many bytes, or to so many times what is stored."""

_OVERHEAD = 1 << 20
"""Bytes that a decompressed item may have beyond its tensor: header, directory, padding."""


@dataclass(frozen=True, slots=True, eq=False)
class PlainChunks:
    """K chunks that may be read whole, without a `ChunkSource`: their elements lie in C order.

    Attributes:
        start: [K] first byte in the file; -1 where there is more to say.
        nbytes: [K] bytes of the elements, where `start` is not -1.
        crc: [K] their CRC-32; -1 where none is known.
    """

    start: I64
    nbytes: I64
    crc: I64

    def take(self, rows: I64) -> PlainChunks:
        """Those rows, in that order."""
        return PlainChunks(self.start[rows], self.nbytes[rows], self.crc[rows])


class ChunkLocations:
    """The sources of one checkpoint's chunks, by their row in `Index.chunks`."""

    def __init__(self, store: Store, index: Index) -> None:
        self.store = store
        self.index = index
        self._known: dict[int, ChunkSource] = {}
        self._alike: container.Known = {}
        self._size = lru_cache(maxsize=None)(lambda file: store.head(file).size)

    def locate(self, rows: Iterable[int], *, threads: int | None = None) -> dict[int, ChunkSource]:
        """The sources of these chunks. Reads item headers where the index does not say enough.

        Raises:
            Damaged: an item lies beyond its file, or the file is missing.
            FormatError: an item's header contradicts the index.
        """
        wanted = list(rows)
        unknown = [row for row in wanted if row not in self._known]
        asked = [row for row in unknown if self.index.chunks.payload[row] < 0]
        headers = self._ask(asked, threads or settings.read_threads()) if asked else {}
        for row in unknown:
            found = headers[row] if row in headers else self._locate(row)
            if isinstance(found, ShardkeepError):
                raise found
            self._known[row] = found
        return {row: self._known[row] for row in wanted}

    def _ask(self, rows: list[int], threads: int) -> dict[int, ChunkSource | ShardkeepError]:
        """The sources of chunks by the headers of their items, or what is wrong with those.

        Small items that are near one another are read at once.
        """
        wants = [
            WantedRange(item.file, item.offset, item.offset + item.length, row)
            for row, item in zip(rows, map(self.item, rows), strict=True)
        ]
        small = [want for want in wants if want.high - want.low <= _WHOLE]
        reads = list(merge_ranges(small, settings.read_gap_bytes(), _TOGETHER))
        reads += [MergedRead(*want[:3], [want]) for want in wants if want.high - want.low > _WHOLE]
        found: dict[int, ChunkSource | ShardkeepError] = {}
        with ThreadPoolExecutor(threads) as pool:
            for some in pool.map(self._headers, reads):
                found |= some
        return found

    def _headers(self, read: MergedRead) -> dict[int, ChunkSource | ShardkeepError]:
        data = b""
        if len(read.wants) > 1 and 0 <= read.low < read.high <= self._size_or_none(read.file):
            with suppress(OSError):  # what is wrong is found out item by item
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
        """What is simple about these chunks, if they are small; all others are located.

        Args:
            rows: ascending.
            limit: bytes of a small chunk at most, not more than `BLOCK`.

        Raises:
            Damaged, FormatError: as from `locate`.
        """
        chunks, tensors = self.index.chunks, self.index.tensors
        itemsize = ITEMSIZES[tensors.dtype[chunks.tensor[rows]]]
        # Roughly first: exact numbers of a hostile shape might wrap around.
        rough = chunks.sizes[rows].prod(axis=1, dtype=np.float64) * itemsize
        small = rough <= limit
        nbytes = np.where(small, rough, -1).astype(np.int64)
        checksums = chunks.block[rows + 1] - chunks.block[rows]
        small &= checksums <= 1
        crc = np.full(len(rows), -1, dtype=np.int64)
        crc[checksums == 1] = chunks.checksums[chunks.block[rows[checksums == 1]]]
        start = np.where(small & self._simple(rows, nbytes), chunks.payload[rows], -1)
        doubtful = np.flatnonzero(start < 0)
        found = self.locate(rows[doubtful].tolist(), threads=threads)
        for k in doubtful[small[doubtful]].tolist():
            if _is_plain(source := found[int(rows[k])]):
                start[k] = source.start
                crc[k] = -1 if source.checksums is None else source.checksums[0]
        return PlainChunks(start, nbytes, crc)

    def _simple(self, rows: I64, nbytes: I64) -> NDArray[np.bool_]:
        """Whether the index says where these payloads are, inside their items, inside their files.

        Negative `nbytes` are of no interest.
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
        """The tensor that a chunk belongs to."""
        return self.index.tensors.names[int(self.index.chunks.tensor[row])]

    def nbytes(self, row: int) -> int:
        """Bytes of a chunk's elements."""
        chunks = self.index.chunks
        dtype = DTYPES[self.index.tensors.dtype[int(chunks.tensor[row])]]
        nbytes: int = prod(chunks.sizes[row].tolist()) * dtype.itemsize
        return nbytes

    def item(self, row: int) -> ByteRange:
        """The item of a chunk."""
        chunks = self.index.chunks
        file = self.index.files[int(chunks.file[row])]
        return ByteRange(file, int(chunks.item[row]), int(chunks.length[row]))

    def bare(self, row: int, data: bytes | None = None) -> bool:
        """Whether a chunk's item is its elements alone, as in a safetensors file.

        `data` are the item's bytes, where they are known.
        """
        item = self.item(row)
        if self.index.chunks.transform[row] or item.length != self.nbytes(row):
            return False
        # A tensor that repeats its elements may have a container that is as long by chance.
        if data is None:
            begin = ByteRange(item.file, item.offset, min(4, item.length))
            data = read_range(self.store, begin, self.name(row))
        return data[:4] != b"PK\x03\x04"

    def object(self, row: int) -> ByteRange:
        """The item of an object, by its row in `Index.objects`."""
        objects = self.index.objects
        file = self.index.files[int(objects.file[row])]
        return ByteRange(file, int(objects.item[row]), int(objects.length[row]))

    def _locate(self, row: int, data: bytes | None = None) -> ChunkSource:
        """The source of a chunk; `data` are its item's bytes, where they are known."""
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
            raise FormatError("its payload leaves its item", file=item.file, place=place)
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
    """A source from an item's own header, which must say the same as the index."""
    place = f"tensor {name!r}"
    if stored.dtype.name not in (dtype.name, _CARRIERS.get(dtype.name)) or stored.shape != sizes:
        raise FormatError(
            f"the metadata says {dtype}{list(sizes)}, "
            f"but its item holds {stored.dtype}{list(stored.shape)}",
            file=item.file,
            place=place,
        )
    nbytes = prod(sizes) * dtype.itemsize
    if nbytes > stored.record.nbytes + _EXPANDED:
        raise FormatError(
            f"a tensor of {nbytes} bytes can't come out of {stored.record.nbytes} stored ones",
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
    """The CRC-32 of a payload that is not larger than a block is that block's digest."""
    if source.crc is None or not 0 < source.payload[1] <= BLOCK:
        return source
    return replace(source, checksums=np.array([source.crc], dtype=np.uint32))


def _check_record(
    stored: container.StoredTensor, source: ChunkSource, record: bytes, name: str
) -> None:
    """Compare the bytes of a record, which are in memory, with its CRC-32."""
    found = crc32(record)
    if found != stored.record.crc32:
        raise Damaged(describe_mismatch(found, stored.record.crc32), file=source.file, name=name)


def _resolved(
    stored: container.StoredTensor, source: ChunkSource, record: bytes, name: str
) -> ChunkSource:
    """A source whose elements are stored conjugated or negated: what they mean, in memory."""
    _check_record(stored, source, record, name)
    array = container.array(stored, memoryview(record))
    data = memoryview(array.tobytes())
    strides = _c_strides(source.sizes, source.itemsize)
    return replace(source, start=0, strides=strides, payload=(0, len(data)), data=data)


def _is_plain(source: ChunkSource) -> bool:
    """Whether a small chunk is its payload's elements in C order, where one checksum covers
    those."""
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
    """Bytes that may come out of the stream transforms of an item.

    Args:
        packed: bytes of the item.
        nbytes: bytes of its tensor; None for an object, whose size nobody tells: a few bytes must
            not fill the memory.
    """
    return max(_UNPACKED, _RATIO * packed) if nbytes is None else nbytes + _OVERHEAD


def inside(data: bytes) -> Callable[[int, int], bytes]:
    """Reads parts of an item that is in memory."""
    return lambda offset, length: data[offset : offset + length]


def window(
    store: Store, item: ByteRange, name: str, whole: bytes | None = None
) -> Callable[[int, int], bytes]:
    """Reads parts of an item, relative to its start; a few bytes at its ends come in one read.

    `whole` are the item's bytes, where they are known.
    """
    if whole is None and item.length <= _WHOLE:
        whole = read_range(store, item, name)

    @lru_cache(maxsize=4)
    def edge(start: int) -> bytes:
        return read_range(store, ByteRange(item.file, item.offset + start, _EDGE), name)

    def read_at(offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > item.length:
            raise FormatError("a record leaves its item", file=item.file, place=name)
        if whole is not None:
            return whole[offset : offset + length]
        for start in (0, item.length - _EDGE):
            if start <= offset and offset + length <= start + _EDGE:
                return edge(start)[offset - start : offset - start + length]
        return read_range(store, ByteRange(item.file, item.offset + offset, length), name)

    return read_at


def read_range(store: Store, where: ByteRange, name: str) -> bytes:
    """All bytes of a range. Raises Damaged where the file is missing or ends before."""
    try:
        data = store.get_range(where.file, where.offset, where.length)
    except FileNotFoundError:
        raise Damaged("the file is missing", file=where.file, name=name) from None
    if len(data) < where.length:
        raise Damaged(
            f"{where.length} bytes are wanted at {where.offset}, {len(data)} are there",
            file=where.file,
            name=name,
        )
    return data
