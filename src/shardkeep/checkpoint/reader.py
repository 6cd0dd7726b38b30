"""The reader of a committed checkpoint, which everything else that reads is built on. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import attrgetter
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep import settings
from shardkeep.checkpoint import commit, read_plan
from shardkeep.checkpoint.chunk_locations import ChunkLocations, read_range, unpacked_limit
from shardkeep.checkpoint.read_plan import Memory, ReadPlan
from shardkeep.checkpoint.single_read import read_small_part
from shardkeep.checkpoint.verify import VerifyReport, verify
from shardkeep.errors import Damaged, FormatError
from shardkeep.format import values
from shardkeep.format.dcp import transforms
from shardkeep.format.manifest.read import Outline
from shardkeep.format.torch_zip import container
from shardkeep.io.checksums import crc32
from shardkeep.io.read.copies import ChunkCopy, ReadStats, read_copies
from shardkeep.plan.coverage import coverage
from shardkeep.plan.overlap import Boxes, sorted_unique
from shardkeep.state.flatten import unflatten
from shardkeep.stores import open_store
from shardkeep.stores.contract import Store
from shardkeep.types import (
    DTYPES,
    I64,
    Box,
    Chunk,
    DType,
    Index,
    ObjectInfo,
    Progress,
    Structure,
    TensorInfo,
)

__all__ = ["CheckpointReader", "Request", "open_reader"]


def open_reader(
    path: str | PathLike[str] | Store,
    *,
    manifest: bool = True,
    rank: tuple[int, int] | None = None,
) -> CheckpointReader:
    """Return a reader of the checkpoint that is committed at `path`; no tensor data is read.

    Args:
        path: a folder, or a store.
        manifest: False reads only `.metadata`, as stock torch does.
        rank: (rank, number of ranks). Where each rank saved a checkpoint of its own
            (`use_collectives=False` in DCP), the one of this rank, if as many ranks saved. By
            default those of all ranks.

    Raises:
        NotACheckpoint: no checkpoint is committed there.
        FormatError: the metadata is broken or hostile.
        Damaged: the metadata does not match its checksum.
    """
    store = open_store(path)
    return CheckpointReader(store, commit.find(store, manifest=manifest, rank=rank))


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A box of a tensor, and the array to read it into.

    Attributes:
        name: flat name of the tensor.
        box: the part to read, in global coordinates.
        into: a writable array of the box's sizes, of any dtype with the tensor's item size.
    """

    name: str
    box: Box
    into: NDArray[Any]


class CheckpointReader:
    """Reads one committed checkpoint: its metadata when they are first used, data on request."""

    def __init__(self, store: Store, found: commit.Found) -> None:
        self.store = store
        self.found = found
        self._layouts: dict[int, _TensorLayout] = {}

    @property
    def url(self) -> str:
        """The checkpoint's path or URL."""
        return self.store.url

    @property
    def kind(self) -> str:
        """What wrote the checkpoint: "shardkeep", "dcp", "dcp-per-rank" or "safetensors"."""
        return self.found.kind

    @cached_property
    def outline(self) -> Index | Outline:
        """Names, dtypes, shapes and structure; the columns of chunks may be missing."""
        index: Index | None = vars(self).get("index")  # Has all of that, if it was read already.
        return self.found.outline() if index is None else index

    @cached_property
    def index(self) -> Index:
        """Everything that the metadata say, as columns."""
        return self.found.index()

    @cached_property
    def locations(self) -> ChunkLocations:
        """Locations of the chunks in data files."""
        return ChunkLocations(self.store, self.index)

    def __len__(self) -> int:
        return len(self.tensor_rows) + len(self.object_rows)

    def __iter__(self) -> Iterator[str]:
        yield from self.tensor_rows
        yield from self.object_rows

    def __contains__(self, name: object) -> bool:
        return name in self.tensor_rows or name in self.object_rows

    @cached_property
    def tensor_rows(self) -> Mapping[str, int]:
        """Name of each tensor -> its row in `Index.tensors`."""
        names = self.outline.tensors.names
        return dict(zip(names, range(len(names)), strict=True))

    @cached_property
    def object_rows(self) -> Mapping[str, int]:
        """Name of each object -> its row in `Index.objects`, without legacy duplicates."""
        legacy_duplicates = self.outline.legacy_duplicates
        names = self.outline.objects.names
        return {name: row for row, name in enumerate(names) if name not in legacy_duplicates}

    def rows(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Return the rows of tensors in `Index.tensors`; -1 for a name that is not a tensor's."""
        known = self.tensor_rows
        return np.fromiter((known.get(name, -1) for name in names), np.int64, len(names))

    @cached_property
    def dtypes_and_shapes(self) -> Mapping[str, tuple[DType, tuple[int, ...]]]:
        """Dtype and global shape of every tensor, by name: for callers that need most of them."""
        tensors = self.index.tensors
        shapes: list[tuple[int, ...]] = [()] * len(tensors.names)
        for ndim in np.flatnonzero(np.bincount(tensors.ndim)).tolist():
            rows = np.flatnonzero(tensors.ndim == ndim)
            for row, shape in zip(rows.tolist(), tensors.shape[rows, :ndim].tolist(), strict=True):
                shapes[row] = tuple(shape)
        dtypes = map(DTYPES.__getitem__, tensors.dtype.tolist())
        return dict(zip(tensors.names, zip(dtypes, shapes, strict=True), strict=True))

    def is_tensor(self, name: str) -> bool:
        """Return whether a name is a tensor's; KeyError if nothing has that name."""
        if name in self.tensor_rows:
            return True
        if name in self.object_rows:
            return False
        raise KeyError(f"{self.url} has no tensor or object named {name!r}")

    def dtype_and_shape(self, name: str) -> tuple[DType, tuple[int, ...]]:
        """Return the dtype and the global shape of a tensor, without reading its chunk columns."""
        row, tensors = self.tensor_rows[name], self.outline.tensors
        shape = tuple(tensors.shape[row, : tensors.ndim[row]].tolist())
        return DTYPES[tensors.dtype[row]], shape

    def tensor(self, name: str) -> TensorInfo:
        """Return a tensor's dtype, shape and chunks; KeyError if no tensor has that name."""
        dtype, shape = self.dtype_and_shape(name)
        chunks = self.index.chunks

        def chunk(row: int) -> Chunk:
            offsets, sizes = chunks.offsets[row, : len(shape)], chunks.sizes[row, : len(shape)]
            box = Box(tuple(offsets.tolist()), tuple(sizes.tolist()))
            return Chunk(box, self.locations.item(row))

        return TensorInfo(name, dtype, shape, tuple(map(chunk, self.chunk_rows(name))))

    def object(self, name: str) -> ObjectInfo:
        """Return an object's item and value; KeyError if no object has that name."""
        return ObjectInfo(name, self.locations.object(self.object_rows[name]), self.value(name))

    def chunk_rows(self, name: str) -> range:
        """Return the rows of a tensor's chunks in `Index.chunks`."""
        row = self.tensor_rows[name]
        return range(*self._first_chunk[row : row + 2].tolist())

    @cached_property
    def _first_chunk(self) -> NDArray[np.int64]:
        """[N + 1] the chunks of tensor i are first[i]:first[i + 1]."""
        rows = np.arange(len(self.tensor_rows) + 1)
        return np.searchsorted(self.index.chunks.tensor, rows).astype(np.int64)

    @cached_property
    def _is_one_chunk(self) -> NDArray[np.bool_]:
        """[N] whether a tensor is stored as one chunk that covers it."""
        chunks, tensors = self.index.chunks, self.index.tensors
        counts = np.diff(self._first_chunk)
        single: NDArray[np.bool_] = counts == 1
        row = self._first_chunk[:-1][single]
        whole = (chunks.sizes[row] == tensors.shape[single]) & (chunks.offsets[row] == 0)
        single[single] = whole.all(axis=1)
        return single

    def tree(self) -> Any:
        """Return the nested state: a `TensorInfo` for each tensor, and the values of objects."""

        def leaf(name: str) -> Any:
            return self.tensor(name) if name in self.tensor_rows else self.value(name)

        return unflatten(self.structure, leaf)

    @property
    def structure(self) -> Structure:
        """How the names nest; flat if the checkpoint does not say."""
        known = self.outline.structure
        return known or Structure({name: (name,) for name in self}, {(): "dict"})

    def read(self, name: str, box: Box | None = None, *, verify: bool = True) -> Any:
        """Return a tensor, or a box of it, as a numpy array, or an object's value.

        What does not depend on the box is computed once for each tensor: many single reads cost
        little more than their bytes. `fill` reads many boxes at once.

        Args:
            name: flat name of the tensor or object.
            box: the part of the tensor to read, in global coordinates; only its bytes are read.
            verify: whether to check the checksums of what is read.

        Raises:
            KeyError: nothing has that name.
            ValueError: the box reaches out of the tensor, or the name is an object's.
            Damaged: bytes are missing or do not match their checksum.
        """
        if not self.is_tensor(name):
            if box is not None:
                raise ValueError(f"{name!r} is an object and has no box; read it without one")
            return self.value(name)
        layout = self._layout(name)
        wanted = layout.whole if box is None else box
        if not wanted.within(layout.whole.sizes):
            raise ValueError(
                f"box {wanted} reaches out of tensor {name!r} of shape {list(layout.whole.sizes)}"
            )
        parts = layout.parts_of(wanted)
        # Refuses a shape that the files can't fill, before memory is allocated for it.
        sources = self.locations.locate([row for row, _, _ in parts])
        array = np.empty(wanted.sizes, dtype=layout.dtype.numpy)
        copies = []
        for row, inside, target in parts:
            view: tuple[Any, ...] = (*target.slices, ...)  # The view of a scalar, not its value.
            source, into = sources[row], array[view]
            if not read_small_part(self.store, name, source, inside, into, verify=verify):
                copies.append(ChunkCopy(name, source, inside, into))
        if copies:
            read_copies(self.store, copies, verify=verify, threads=settings.read_threads())
        return array

    def _layout(self, name: str) -> _TensorLayout:
        """Return where the chunks of a tensor are in it, once they are known to cover it."""
        row = self.tensor_rows[name]
        layout = self._layouts.get(row)
        if layout is None:
            self._check_coverage(np.array([row], dtype=np.int64))
            dtype, shape = self.dtype_and_shape(name)
            rows, chunks = self.chunk_rows(name), self.index.chunks
            offsets = chunks.offsets[rows.start : rows.stop, : len(shape)]
            sizes = chunks.sizes[rows.start : rows.stop, : len(shape)]
            layout = _TensorLayout(dtype, Box.whole(shape), rows.start, offsets, offsets + sizes)
            self._layouts[row] = layout
        return layout

    def value(
        self,
        name: str,
        *,
        makers: Mapping[str, Callable[..., Any]] | None = None,
        decode: Callable[[bytes], Any] | None = None,
        limit: int | None = None,
    ) -> Any:
        """Return an object's value; parts of unknown classes are `Opaque`.

        Args:
            name: flat name of the object.
            makers: functions that build values of torch's own types from the manifest
                (`format.values`).
            decode: builds the value from the bytes of its item, if the manifest does not have it.
            limit: largest number of bytes of the decompressed item; more is a FormatError.
        """
        known = self.outline.objects.values
        if name in known:
            return values.decode(known[name], *([makers] if makers else []))
        data = self.item_bytes(name, limit=limit)
        with self.name_errors(name):
            return container.value(data, file="", place=name) if decode is None else decode(data)

    @contextmanager
    def name_errors(self, name: str) -> Iterator[None]:
        """Add the name and the file of an item to errors that decoding its bytes raises."""
        try:
            yield
        except (Damaged, FormatError) as error:
            if name in self.tensor_rows:
                where = self.locations.item(self.chunk_rows(name)[0])
            else:
                where = self.locations.object(self.object_rows[name])
            if isinstance(error, FormatError):
                raise error.within(file=where.file) from None
            raise Damaged(error.what, file=where.file, name=name, block=error.block) from None

    def item_bytes(self, name: str, *, limit: int | None = None) -> bytes:
        """Return the bytes of the item of an object, or of a tensor that is one chunk.

        Stream transforms (compression) are undone.

        Args:
            name: flat name of the object or tensor.
            limit: largest number of bytes of an object's item once it is decompressed.

        Raises:
            Damaged: bytes are missing or do not match their checksum.
            FormatError: the item does not decompress, or to too many bytes.
        """
        nbytes: int | None = None
        crc = -1
        if name in self.tensor_rows:
            (row,) = self.chunk_rows(name)
            where, transform = self.locations.item(row), self.index.chunks.transform[row]
            nbytes = self.tensor(name).nbytes
        else:
            row, objects = self.object_rows[name], self.index.objects
            where, transform = self.locations.object(row), objects.transform[row]
            crc = int(objects.crc[row])
        data = read_range(self.store, where, name)
        if crc >= 0 and crc32(data) != crc:
            raise Damaged("bytes do not match their checksum", file=where.file, name=name)
        undo = self.index.transforms[int(transform)]
        if not undo:
            return data
        limit = limit or unpacked_limit(len(data), nbytes)
        return transforms.undo(data, undo, limit=limit, file=where.file, place=name)

    def verify(
        self, *, threads: int | None = None, progress: Progress | None = None
    ) -> VerifyReport:
        """Check all bytes that have a checksum; damage is reported, not raised.

        Args:
            threads: number of threads that read; by default the setting for reads.
            progress: called with the bytes that are checked and the bytes to check.
        """
        return verify(self.found, self.locations, threads=threads, progress=progress)

    def fill(
        self,
        requests: Sequence[Request],
        *,
        verify: bool = True,
        threads: int | None = None,
        budget: int | None = None,
    ) -> ReadStats:
        """Read many boxes into arrays, in parallel, and only the byte ranges that they need.

        Args:
            requests: the boxes, and the arrays to fill.
            verify: whether to check the checksums of what is read.
            threads: number of threads that read; by default the setting for reads.
            budget: bytes of memory that reading may take besides the arrays; by default the
                setting for host memory.

        Raises:
            FormatError: the chunks of a tensor do not cover it.
            Damaged: bytes are missing or do not match their checksum.
        """
        threads = threads or settings.read_threads()
        names = [request.name for request in requests]
        wanted = self.boxes(names, [request.box for request in requests])
        planned = self.plan(wanted, _Arrays(requests), threads=threads)
        return planned.run(self.store, verify=verify, threads=threads, budget=budget)

    def boxes(self, names: Sequence[str], boxes: Sequence[Box]) -> Boxes:
        """Return boxes of tensors, by name, as columns; KeyError for a name that no tensor has."""
        rows = self.rows(names)
        if (rows < 0).any():
            raise KeyError(next(name for name in names if name not in self.tensor_rows))
        return _boxes(rows, boxes, self.index.chunks.offsets.shape[1])

    def plan(
        self,
        wanted: Boxes,
        memory: Memory,
        *,
        threads: int,
        together: bool = False,
        budget: int | None = None,
    ) -> ReadPlan:
        """Return a plan of how to read boxes into memory; see `read_plan.plan`.

        Raises:
            FormatError: the chunks of a tensor do not cover it.
            Damaged: a file that has to be looked at is missing or too short.
        """
        self._check_coverage(sorted_unique(wanted.tensor))
        return read_plan.plan(
            self.locations, wanted, memory, threads=threads, together=together, budget=budget
        )

    def check_coverage(self) -> None:
        """Raise a FormatError if the chunks of any tensor do not cover it."""
        self._check_coverage(np.arange(len(self.tensor_rows), dtype=np.int64))

    def _check_coverage(self, rows: NDArray[np.int64]) -> None:
        """Raise a FormatError for a tensor with holes: memory there would stay uninitialized."""
        tensors, chunks = self.index.tensors, self.index.chunks
        simple = self._is_one_chunk[rows]
        if simple.all():
            return
        rows = rows[~simple]
        used = np.isin(chunks.tensor, rows)
        problems = coverage(
            np.searchsorted(rows, chunks.tensor[used]),
            tensors.shape[rows],
            chunks.offsets[used],
            chunks.sizes[used],
        )
        if problems:
            problem = problems[0]
            row = int(rows[problem.tensor])
            ndim = int(tensors.ndim[row])
            box = Box(problem.box.offsets[:ndim], problem.box.sizes[:ndim])
            raise FormatError(
                f"its chunks have a {problem.kind} at {box}",
                file=self.found.file,
                place=f"tensor {tensors.names[row]!r}",
            )


@dataclass(frozen=True, slots=True, eq=False)
class _TensorLayout:
    """A tensor, and the boxes of its chunks as columns.

    Attributes:
        dtype: its element type.
        whole: the box that is the whole tensor.
        first_row: row of its first chunk in `Index.chunks`.
        starts: [K, ndim] first element of each chunk, in every dimension.
        ends: [K, ndim] one past the last element.
    """

    dtype: DType
    whole: Box
    first_row: int
    starts: I64
    ends: I64

    def parts_of(self, box: Box) -> list[tuple[int, Box, Box]]:
        """Return which chunks hold parts of a box.

        Returns:
            For each chunk its row in `Index.chunks`, the part relative to the chunk, and the part
            relative to `box`.
        """
        if len(self.starts) == 1:  # It covers the tensor, which was checked.
            return [(self.first_row, box, Box.whole(box.sizes))] if box.numel else []
        starts = np.maximum(self.starts, box.offsets)
        sizes = np.minimum(self.ends, box.ends) - starts
        found = np.flatnonzero((sizes > 0).all(axis=1))
        inside = (starts - self.starts)[found].tolist()
        target = (starts - np.array(box.offsets, dtype=np.int64))[found].tolist()
        return [
            (self.first_row + chunk, Box(tuple(a), tuple(size)), Box(tuple(b), tuple(size)))
            for chunk, a, b, size in zip(
                found.tolist(), inside, target, sizes[found].tolist(), strict=True
            )
        ]


class _Arrays(Memory):
    """The arrays of requests as the destination of a read plan."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests

    def addresses(self, rows: I64) -> I64:
        return np.zeros(len(rows), dtype=np.int64)

    def array(self, row: int) -> NDArray[Any]:
        return self._requests[row].into

    def put(self, row: int, part: Box, data: NDArray[np.uint8]) -> None:
        raise NotImplementedError("every request has an array")


_OFFSETS, _SIZES = attrgetter("offsets"), attrgetter("sizes")


def _boxes(rows: NDArray[np.int64], boxes: Sequence[Box], width: int) -> Boxes:
    offsets = np.zeros((len(boxes), width), dtype=np.int64)
    sizes = np.ones((len(boxes), width), dtype=np.int64)
    ndims = np.fromiter(map(len, map(_SIZES, boxes)), np.int64, len(boxes))
    for ndim in np.flatnonzero(np.bincount(ndims)).tolist():
        mine = np.flatnonzero(ndims == ndim)
        some = [boxes[row] for row in mine.tolist()]
        for column, part in ((offsets, _OFFSETS), (sizes, _SIZES)):
            flat = np.fromiter(chain.from_iterable(map(part, some)), np.int64, len(mine) * ndim)
            column[mine, :ndim] = flat.reshape(len(mine), ndim)
    return Boxes(rows, offsets, sizes)
