"""Readers of the zip that `torch.save` writes: an item of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from shardkeep.errors import Damaged, FormatError
from shardkeep.format.excerpt import shown
from shardkeep.format.pickle.builders import CORE
from shardkeep.format.pickle.reader import loads
from shardkeep.format.pickle.registry import Builder
from shardkeep.format.pickle.torch_builders import Record, StoredTensor, persistent_storage
from shardkeep.format.torch_zip.directory import ReadAt, records

__all__ = ["Known", "ReadAt", "Record", "StoredTensor", "array", "records", "tensor", "value"]

_MAX_PICKLE = 1 << 20
"""Maximum bytes of the pickle of one tensor; real ones have some hundred."""

_EXPANDED = 64 << 20
"""Bytes that the tensors of one object may take beyond its own: expanded and shared ones do."""

Bytes = TypeVar("Bytes", bytes, memoryview)


class _Archive:
    """The records of one container, by name without the folder."""

    def __init__(self, read_at: ReadAt, length: int, *, file: str, place: str) -> None:
        self.file, self.place = file, place
        self._read_at = read_at
        found = records(read_at, length, file=file, place=place)
        pickles = [record for record in found if record.name.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].name.count("/") != 1:
            raise self.error(f"a zip with {len(pickles)} records data.pkl")
        self.pickle = pickles[0]
        folder = self.pickle.name.removesuffix("data.pkl")
        self._records = {record.name: record for record in found}
        self._folder = folder
        order = self._records.get(f"{folder}byteorder")
        if order is not None and (order.nbytes > 16 or self.read(order) != b"little"):
            raise self.error("written on a big-endian machine: its bytes are in the other order")

    @property
    def places(self) -> tuple[tuple[str, int, int], ...]:
        """Name, offset and bytes of each record."""
        return tuple((one.name, one.offset, one.nbytes) for one in self._records.values())

    def record(self, name: str) -> Record:
        """Return the record of that name, with its folder."""
        return self._records[name]

    def error(self, what: str) -> FormatError:
        return FormatError(what, file=self.file, place=self.place)

    def read(self, record: Record) -> bytes:
        """Return the bytes of a record."""
        data = self._read_at(record.offset, record.nbytes)
        if len(data) != record.nbytes:
            raise self.error(f"record {shown(record.name)} is cut short")
        return self.checked(record, data)

    def checked(self, record: Record, data: Bytes) -> Bytes:
        """Return the bytes of a record if they match its CRC-32; raise Damaged otherwise."""
        if crc32(data) != record.crc32:
            what = f"record {shown(record.name)} does not match its CRC-32"
            raise Damaged(what, file=self.file, name=self.place)
        return data

    def data(self, key: str) -> Record:
        """Return the record of a storage."""
        record = self._records.get(f"{self._folder}data/{key}")
        if record is None:
            raise FormatError(f"a storage {shown(key)} without a record")
        return record

    def load(self, builders: Mapping[str, Builder], finish: Callable[[StoredTensor], Any]) -> Any:
        """Return the value of the pickle, with tensors converted by `finish`."""
        try:
            return loads(
                self.read(self.pickle),
                builders,
                persistent=lambda key: persistent_storage(key, self.data, finish),
            )
        except FormatError as error:
            place = ", ".join(part for part in (self.place, "data.pkl", error.place) if part)
            raise FormatError(error.what, file=self.file, place=place) from error


Known = dict[Any, StoredTensor]
"""Results of `tensor`, by everything that they depend on except file and place."""

_MAX_KNOWN = 1024


def tensor(
    read_at: ReadAt, length: int, *, file: str, place: str, known: Known | None = None
) -> StoredTensor:
    """Return the location of a tensor item's elements, reading only its directory and its pickle.

    Args:
        read_at: reads (offset, length), relative to the item.
        length: bytes of the item.
        file, place: name the item in errors.
        known: a cache for many similar items, which is extended: a pickle with the same bytes, for
            records with the same names at the same places, is not interpreted again.

    Raises:
        FormatError: the item is not such a zip, contains no plain tensor, or refers to elements
            beyond its record.
        Damaged: its pickle does not match its CRC-32.
    """
    archive = _Archive(read_at, length, file=file, place=place)
    if archive.pickle.nbytes > _MAX_PICKLE:
        raise archive.error(f"a tensor whose pickle has {archive.pickle.nbytes} bytes")
    known = {} if known is None else known
    alike = (archive.read(archive.pickle), archive.places)
    seen = known.get(alike)
    if seen is not None:
        return replace(seen, record=archive.record(seen.record.name))
    stored = archive.load(CORE, lambda found: found)
    if type(stored) is not StoredTensor:
        kind = getattr(stored, "name", type(stored).__name__)
        raise archive.error(f"its item holds no plain tensor, but a {kind}")
    if len(known) < _MAX_KNOWN:
        known[alike] = stored
    return stored


MakeTensor = Callable[[StoredTensor, memoryview], Any]


def value(
    data: bytes,
    builders: Mapping[str, Builder] = CORE,
    *,
    file: str,
    place: str,
    make_tensor: MakeTensor | None = None,
) -> Any:
    """Return the value of an object item. Classes that are not in `builders` become `Opaque`.

    Args:
        data: the item.
        builders: what may be built; a `Registry` saves time for many items.
        file, place: name the item in errors.
        make_tensor: makes a tensor inside the object, from its description and the bytes of its
            record (where it starts at `stored.start - stored.record.offset`). Without it, tensors
            become numpy arrays with their own memory.

    Raises:
        FormatError: the item is not such a zip, its pickle is invalid or hostile, or its tensors
            take much more memory than the item.
        Damaged: a record that is needed does not match its CRC-32.
    """
    view = memoryview(data)
    archive = _Archive(
        lambda offset, length: data[offset : offset + length], len(data), file=file, place=place
    )
    make = make_tensor or array
    room = _EXPANDED + 4 * len(data)

    def finish(stored: StoredTensor) -> Any:
        nonlocal room
        room -= stored.nbytes
        if room < 0:
            raise FormatError("its tensors take much more memory than there are bytes")
        start = stored.record.offset
        record = view[start : start + stored.record.nbytes]
        return make(stored, archive.checked(stored.record, record))

    return archive.load(builders, finish)


def array(stored: StoredTensor, record: memoryview) -> NDArray[Any]:
    """Return a tensor as a numpy array with its own memory, in C order.

    Args:
        stored: describes it; its strides were checked against the record.
        record: the bytes of its record.
    """
    dtype = stored.dtype.numpy
    start = stored.start - stored.record.offset
    if 0 in stored.shape:
        return np.empty(stored.shape, dtype)
    steps = tuple(step * dtype.itemsize for step in stored.strides)
    view: NDArray[Any] = np.ndarray(stored.shape, dtype, record, start, steps)
    made: NDArray[Any] = view.copy("C")
    if stored.conj:
        np.conjugate(made, out=made)
    if stored.neg:
        np.negative(made, out=made)
    return made
