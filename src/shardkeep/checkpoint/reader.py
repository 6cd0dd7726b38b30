"""A committed checkpoint as a mapping: look into it, read it, check it. No torch."""

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
from shardkeep.checkpoint.verify import VerifyReport, verify
from shardkeep.errors import Damaged, FormatError
from shardkeep.format import values
from shardkeep.format.dcp import transforms
from shardkeep.format.manifest.read import Outline
from shardkeep.format.torch_zip import container
from shardkeep.io.checksums import crc32
from shardkeep.io.read.copies import ReadStats
from shardkeep.plan.coverage import coverage
from shardkeep.plan.overlap import Boxes, each_once
from shardkeep.state.flatten import unflatten
from shardkeep.stores import store_at
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

__all__ = ["Checkpoint", "Request", "open"]


def open(
    path: str | PathLike[str] | Store,
    *,
    manifest: bool = True,
    rank: tuple[int, int] | None = None,
) -> Checkpoint:
    """Open the checkpoint that is committed at `path`; no tensor data is read.

    Args:
        path: a folder, or a store.
        manifest: False reads `.metadata` as stock torch would, even where Shardkeep's manifest
            tells more.
        rank: a rank, of so many: where each rank saved for itself (`use_collectives=False` in DCP),
            what this one saved, if there are as many again. By default what all of them saved.

    Raises:
        NotACheckpoint: there is none.
        FormatError: its metadata is broken or hostile.
        Damaged: its metadata does not match its digest.
    """
    store = store_at(path)
    return Checkpoint(store, commit.find(store, manifest=manifest, rank=rank))


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Read this box of a tensor into that array.

    Attributes:
        name: the tensor.
        box: in global coordinates.
        into: writable, of the box's sizes and of any dtype with the tensor's item size.
    """

    name: str
    box: Box
    into: NDArray[Any]


class Checkpoint(Mapping[str, TensorInfo | ObjectInfo]):
    """What a committed checkpoint holds, by name. Reads only what is asked for."""

    def __init__(self, store: Store, found: commit.Found) -> None:
        self.store = store
        self.found = found

    @property
    def url(self) -> str:
        """Where it lies."""
        return self.store.url

    @property
    def kind(self) -> str:
        """Who wrote it: "shardkeep", "dcp", "dcp-per-rank" or "safetensors"."""
        return self.found.kind

    @cached_property
    def outline(self) -> Index | Outline:
        """Names, dtypes, shapes, structure; its chunk columns may be missing."""
        index: Index | None = vars(self).get("index")  # which has all that, if it was read
        return self.found.outline() if index is None else index

    @cached_property
    def index(self) -> Index:
        """Everything that is known, as columns."""
        return self.found.index()

    def __len__(self) -> int:
        return len(self.outline.tensors.names) + len(self._objects)

    def __iter__(self) -> Iterator[str]:
        yield from self.outline.tensors.names
        yield from self._objects

    def __contains__(self, name: object) -> bool:
        return name in self._tensors or name in self._objects

    def __getitem__(self, name: str) -> TensorInfo | ObjectInfo:
        if name in self._tensors:
            return self.tensor(name)
        if name in self._objects:
            return ObjectInfo(name, self.sources.object(self._objects[name]), self.value(name))
        raise KeyError(name)

    def __repr__(self) -> str:
        tensors, objects = len(self._tensors), len(self._objects)
        return f"<Checkpoint {self.url}: {tensors} tensors, {objects} objects, {self.kind}>"

    @cached_property
    def _tensors(self) -> Mapping[str, int]:
        names = self.outline.tensors.names
        return dict(zip(names, range(len(names)), strict=True))

    def rows(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Which tensors these are; -1 for a name that no tensor has."""
        known = self._tensors
        return np.fromiter((known.get(name, -1) for name in names), np.int64, len(names))

    @cached_property
    def kinds(self) -> Mapping[str, tuple[DType, tuple[int, ...]]]:
        """Dtype and global shape of every tensor, by name; for who needs the chunks as well."""
        tensors = self.index.tensors
        shapes: list[tuple[int, ...]] = [()] * len(tensors.names)
        for ndim in np.flatnonzero(np.bincount(tensors.ndim)).tolist():
            mine = np.flatnonzero(tensors.ndim == ndim)
            for row, shape in zip(mine.tolist(), tensors.shape[mine, :ndim].tolist(), strict=True):
                shapes[row] = tuple(shape)
        dtypes = map(DTYPES.__getitem__, tensors.dtype.tolist())
        return dict(zip(tensors.names, zip(dtypes, shapes, strict=True), strict=True))

    @cached_property
    def _objects(self) -> Mapping[str, int]:
        """Objects that are not twins: those only repeat other names."""
        legacy_duplicates = self.outline.legacy_duplicates
        names = self.outline.objects.names
        return {name: row for row, name in enumerate(names) if name not in legacy_duplicates}

    @cached_property
    def sources(self) -> ChunkLocations:
        """Where the bytes of its chunks lie."""
        return ChunkLocations(self.store, self.index)

    def _rows(self, name: str) -> range:
        """The chunks of a tensor."""
        row = self._tensors[name]
        return range(*self._first_chunk[row : row + 2].tolist())

    @cached_property
    def _first_chunk(self) -> NDArray[np.int64]:
        """[N + 1] the chunks of tensor i are first[i]:first[i + 1]."""
        rows = np.arange(len(self._tensors) + 1)
        return np.searchsorted(self.index.chunks.tensor, rows).astype(np.int64)

    @cached_property
    def _one_chunk(self) -> NDArray[np.bool_]:
        """[N] whether a tensor is one chunk, which covers it."""
        chunks, tensors = self.index.chunks, self.index.tensors
        counts = np.diff(self._first_chunk)
        one: NDArray[np.bool_] = counts == 1
        row = self._first_chunk[:-1][one]
        whole = (chunks.sizes[row] == tensors.shape[one]) & (chunks.offsets[row] == 0)
        one[one] = whole.all(axis=1)
        return one

    def is_tensor(self, name: str) -> bool:
        """Whether that name is a tensor's. KeyError if there is no such name."""
        if name not in self:
            raise KeyError(f"{self.url} holds no {name!r}")
        return name in self._tensors

    def shape_of(self, name: str) -> tuple[DType, tuple[int, ...]]:
        """Dtype and global shape of a tensor, without looking at its chunks."""
        row, tensors = self._tensors[name], self.outline.tensors
        shape = tuple(tensors.shape[row, : tensors.ndim[row]].tolist())
        return DTYPES[tensors.dtype[row]], shape

    def tensor(self, name: str) -> TensorInfo:
        """A tensor's dtype, shape and chunks. KeyError if no tensor has that name."""
        dtype, shape = self.shape_of(name)
        chunks = self.index.chunks

        def chunk(row: int) -> Chunk:
            offsets, sizes = chunks.offsets[row, : len(shape)], chunks.sizes[row, : len(shape)]
            box = Box(tuple(offsets.tolist()), tuple(sizes.tolist()))
            return Chunk(box, self.sources.item(row))

        return TensorInfo(name, dtype, shape, tuple(map(chunk, self._rows(name))))

    def tree(self) -> Any:
        """The nested state, as it was saved: a `TensorInfo` for each tensor, and the values."""
        structure = self.structure
        return unflatten(structure, self._leaf)

    @property
    def structure(self) -> Structure:
        """How the names nest; flat, if the checkpoint does not say."""
        known = self.outline.structure
        return known or Structure({name: (name,) for name in self}, {(): "dict"})

    def _leaf(self, name: str) -> Any:
        return self.tensor(name) if name in self._tensors else self.value(name)

    def read(self, name: str, box: Box | None = None, *, verify: bool = True) -> Any:
        """A tensor as a numpy array, or an object's value.

        Args:
            name: its flat name.
            box: the part of the tensor to read, in global coordinates; only its bytes are read.
            verify: check the checksums of what is read.

        Returns:
            An array of the box's sizes and of the dtype's `numpy` kind (`DType.note` says where
            that only carries the bits).

        Raises:
            KeyError: no such name.
            ValueError: the box leaves the tensor, or the name is an object's and a box is given.
            Damaged: bytes are missing or do not match their digest.
        """
        if not self.is_tensor(name):
            if box is not None:
                raise ValueError(f"{name!r} is an object: it has no box to read")
            return self.value(name)
        dtype, shape = self.shape_of(name)
        wanted = Box.whole(shape) if box is None else box
        if not wanted.within(shape):
            raise ValueError(f"box {wanted} leaves tensor {name!r} of shape {list(shape)}")
        # Both refuse a shape that the files can't fill, before memory is taken for it.
        self._check_cover(np.array([self._tensors[name]], dtype=np.int64))
        self.sources.locate(self._rows(name))
        array = np.empty(wanted.sizes, dtype=dtype.numpy)
        self.fill([Request(name, wanted, array)], verify=verify)
        return array

    def value(
        self,
        name: str,
        *,
        makers: Mapping[str, Callable[..., Any]] | None = None,
        decode: Callable[[bytes], Any] | None = None,
        limit: int | None = None,
    ) -> Any:
        """An object's value; parts of unknown classes are `Opaque`.

        Args:
            name: the object.
            makers: builds values of torch's own types from the manifest (`format.values`).
            decode: builds the value from its item's bytes, where the manifest does not hold it.
            limit: bytes that the item may have once it is decompressed; FormatError beyond.
        """
        known = self.outline.objects.values
        if name in known:
            return values.decode(known[name], *([makers] if makers else []))
        data = self.item(name, limit=limit)
        with self.naming(name):
            return container.value(data, file="", place=name) if decode is None else decode(data)

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Errors in the bytes of an item name it, and its file, whoever decodes them."""
        try:
            yield
        except (Damaged, FormatError) as error:
            if name in self._tensors:
                where = self.sources.item(self._rows(name)[0])
            else:
                where = self.sources.object(self._objects[name])
            if isinstance(error, FormatError):
                raise error.within(file=where.file) from None
            raise Damaged(error.what, file=where.file, name=name, block=error.block) from None

    def item(self, name: str, *, limit: int | None = None) -> bytes:
        """The bytes of the one item that holds an object, or a tensor that is one chunk.

        Stream transforms are undone; `limit` is how many bytes may come out of an object's.
        """
        nbytes: int | None = None
        crc = -1
        if name in self._tensors:
            (row,) = self._rows(name)
            where, transform = self.sources.item(row), self.index.chunks.transform[row]
            nbytes = self.tensor(name).nbytes
        else:
            row, objects = self._objects[name], self.index.objects
            where, transform = self.sources.object(row), objects.transform[row]
            crc = int(objects.crc[row])
        data = read_range(self.store, where, name)
        if crc >= 0 and crc32(data) != crc:
            raise Damaged("bytes do not match their digest", file=where.file, name=name)
        undo = self.index.transforms[int(transform)]
        if not undo:
            return data
        limit = limit or unpacked_limit(len(data), nbytes)
        return transforms.undo(data, undo, limit=limit, file=where.file, place=name)

    def verify(
        self, *, threads: int | None = None, progress: Progress | None = None
    ) -> VerifyReport:
        """Check all bytes that have a digest. Damage is reported, not raised."""
        return verify(self.found, self.sources, threads=threads, progress=progress)

    def fill(
        self,
        requests: Sequence[Request],
        *,
        verify: bool = True,
        threads: int | None = None,
        budget: int | None = None,
    ) -> ReadStats:
        """Read many boxes into memory, in parallel, only the byte ranges that are needed.

        `budget`: as of `ReadPlan.run`.

        Raises:
            FormatError: the chunks of a tensor do not cover it.
            Damaged: bytes are missing or do not match their digest.
        """
        threads = threads or settings.read_threads()
        names = [request.name for request in requests]
        wanted = self.boxes(names, [request.box for request in requests])
        planned = self.plan(wanted, _Arrays(requests), threads=threads)
        return planned.run(self.store, verify=verify, threads=threads, budget=budget)

    def boxes(self, names: Sequence[str], boxes: Sequence[Box]) -> Boxes:
        """Boxes of tensors, by name, as columns. KeyError if no tensor has a name."""
        rows = self.rows(names)
        if (rows < 0).any():
            raise KeyError(next(name for name in names if name not in self._tensors))
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
        """Decide how to read boxes into memory, as `filling.plan` does.

        Raises: as `fill`, but for what is read.
        """
        self._check_cover(each_once(wanted.tensor))
        return read_plan.plan(
            self.sources, wanted, memory, threads=threads, together=together, budget=budget
        )

    def check_cover(self) -> None:
        """Refuse any tensor with holes, as reading it would, with a FormatError."""
        self._check_cover(np.arange(len(self._tensors), dtype=np.int64))

    def _check_cover(self, rows: NDArray[np.int64]) -> None:
        """Refuse tensors with holes: what no chunk holds would come back as whatever was there."""
        tensors, chunks = self.index.tensors, self.index.chunks
        simple = self._one_chunk[rows]
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


class _Arrays(Memory):
    """The arrays of requests."""

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
