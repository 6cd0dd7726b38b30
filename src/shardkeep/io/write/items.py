"""Items into files: head, payload and tail in one pass, with checksums on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.io.checksums import crc32, whole_crc
from shardkeep.io.contract import Codec
from shardkeep.io.pool import parallel
from shardkeep.io.write.written import Written, take_blocks
from shardkeep.plan.packing import pack
from shardkeep.settings import BLOCK
from shardkeep.stores.contract import Store, Writer
from shardkeep.types import I64

__all__ = ["Bare", "Item", "write_items", "write_packed"]

_Bytes = memoryview | NDArray[Any]

_BUFFER = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One item to write: how it is wrapped, and its payload's bytes, C-contiguous.

    `payload` may be a function that makes them: it is called when their turn comes, so that what
    must be copied first (from a device, or out of a view) takes memory one payload at a time.
    """

    codec: Codec
    payload: _Bytes | Callable[[], _Bytes]


@dataclass(frozen=True, slots=True)
class Bare:
    """The codec of what needs no wrapping: `nbytes` that are an item as they are."""

    nbytes: int

    def head(self, position: int) -> bytes:
        return b""

    def tail(self, position: int, crc: int) -> bytes:
        return b""


def write_packed(
    store: Store,
    files: Sequence[str],
    items: Sequence[Item],
    *,
    threads: int,
) -> Written:
    """Write items to new files, shared out so that these are even in bytes; see `write_items`.

    Returns:
        Where they went, in the order of `items`. Every one of `files` exists then, even if empty.
    """
    if not files:
        if items:
            raise ValueError(f"{len(items)} items need at least one file")
        return write_items(store, {}, threads=threads)
    nbytes = np.array([_nbytes(item) for item in items], dtype=np.int64)
    place = pack(nbytes, len(files))
    order = np.argsort(place, kind="stable")
    shares = np.split(order, np.searchsorted(place[order], np.arange(1, len(files))))
    packed = {
        file: [items[row] for row in share.tolist()]
        for file, share in zip(files, shares, strict=True)
    }
    written = write_items(store, packed, threads=threads)
    return written if len(files) < 2 else _take(written, np.argsort(order))


def _take(written: Written, rows: I64) -> Written:
    """These rows, in this order."""
    block, checksums = take_blocks(np.diff(written.block), written.checksums, rows)
    return replace(
        written,
        file=written.file[rows],
        item=written.item[rows],
        length=written.length[rows],
        payload=written.payload[rows],
        block=block,
        checksums=checksums,
        crc=written.crc[rows],
    )


def write_items(store: Store, files: Mapping[str, Sequence[Item]], *, threads: int) -> Written:
    """Write new files, each with its items one after the other; durable on return.

    `store.sync()`, for the names of the files, is the caller's. After an error nothing is left of
    the file that failed, but other files may be complete: the caller removes what it does not
    commit.

    Args:
        store: where to.
        files: name -> its items; no file may exist yet.
        threads: how many files are written at a time.

    Raises:
        OSError: from the store, naming the file. Other threads stop.
    """
    done = {name: _Rows() for name in files}

    def worker(names: Iterator[str]) -> None:
        for name in names:
            try:
                with store.open_writer(name) as sink:
                    _write_file(_Packed(sink), files[name], done[name])
            except OSError as error:
                _name(error, name)
                raise

    parallel(list(files), worker, threads)
    return _written(done)


@dataclass(slots=True)
class _Rows:
    """The columns of one file, as they grow."""

    item: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    payload: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    crc: list[int] = field(default_factory=list)


class _Packed:
    """Collects small writes, so that a small tensor costs no system call of its own."""

    def __init__(self, sink: Writer) -> None:
        self._sink = sink
        self._waiting = bytearray()
        self.position = 0

    def write(self, data: bytes | memoryview) -> None:
        self.position += len(data)
        if len(data) < BLOCK:
            self._waiting += data
            if len(self._waiting) >= _BUFFER:
                self.flush()
        else:
            self.flush()
            self._sink.write(data)

    def flush(self) -> None:
        if self._waiting:
            self._sink.write(self._waiting)
            self._waiting = bytearray()


def _write_file(packed: _Packed, items: Sequence[Item], rows: _Rows) -> None:
    for item in items:
        start = packed.position
        packed.write(item.codec.head(start))
        rows.item.append(start)
        rows.payload.append(packed.position)
        payload = _bytes(item.payload() if callable(item.payload) else item.payload)
        blocks = _write_payload(packed, payload)
        crc = blocks[0] if len(blocks) == 1 else whole_crc(blocks, len(payload))
        packed.write(item.codec.tail(start, crc))
        rows.length.append(packed.position - start)
        rows.blocks.append(len(blocks))
        rows.checksums += blocks
        rows.crc.append(crc)
    packed.flush()


def _write_payload(packed: _Packed, payload: memoryview) -> list[int]:
    """Write it in slices that are still in the cache from their checksums; those are returned."""
    blocks = []
    for at in range(0, len(payload), _BUFFER):
        part = payload[at : at + _BUFFER]
        blocks += [crc32(part[low : low + BLOCK]) for low in range(0, len(part), BLOCK)]
        packed.write(part)
    return blocks


def _nbytes(item: Item) -> int:
    if callable(item.payload):
        return int(getattr(item.codec, "nbytes", 0))
    return item.payload.nbytes


def _bytes(payload: _Bytes) -> memoryview:
    """The payload as plain bytes, without a copy."""
    array = np.asarray(payload)
    if not array.flags.c_contiguous:
        raise ValueError("a payload must be C-contiguous")
    return array.reshape(-1).view(np.uint8).data


def _name(error: OSError, name: str) -> None:
    """Make the error say which file it was, where the store did not."""
    if error.filename is None and name not in str(error):
        if error.errno is None:
            error.args = (f"{name}: {error}",)
        else:
            error.filename = name


def _written(done: Mapping[str, _Rows]) -> Written:
    def column(attribute: str, dtype: type[Any]) -> NDArray[Any]:
        return np.array([x for rows in done.values() for x in getattr(rows, attribute)], dtype)

    counts = column("blocks", np.int64)
    block = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=block[1:])
    return Written(
        files=tuple(done),
        file=np.repeat(np.arange(len(done), dtype=np.int32), [len(r.item) for r in done.values()]),
        item=column("item", np.int64),
        length=column("length", np.int64),
        payload=column("payload", np.int64),
        block=block,
        checksums=column("checksums", np.uint32),
        crc=column("crc", np.uint32),
    )
