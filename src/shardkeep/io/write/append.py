"""Data files whose items become known one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.io.arena import allocate_pages
from shardkeep.io.memory_payloads import MemoryPayloads, address_of
from shardkeep.io.write.files import naming_file
from shardkeep.io.write.windows import FileWindows
from shardkeep.io.write.written import Written
from shardkeep.plan.file_layout import MIN_IN_PLACE_BYTES, lay_out
from shardkeep.settings import ALIGNMENT, BLOCK, PAGE
from shardkeep.stores.contract import Store, Writer
from shardkeep.types import Framing

__all__ = ["AppendedFile", "append_file"]

_LARGE_BYTES = 1 << 20
"""Payloads of this size or more are written without a copy. Copying a smaller one costs less than
writing it alone."""

_BATCH_BYTES = 4 << 20
"""Bytes of small items, frames included, that are collected before they are written."""

_FRAME_BYTES = 1024
"""About what a frame takes, to limit the number of items in a batch."""

_MAX_WINDOW_BYTES = 4 << 20
"""Size limit of one write: its bytes are checksummed right before, and still are in the cache."""


@contextlib.contextmanager
def append_file(store: Store, name: str) -> Iterator[AppendedFile]:
    """Create a file to which items are appended; when the block is left, it is durable.

    The caller must call `store.sync()` to make its name durable, too. After an error it is removed.

    Raises:
        OSError: from the store, naming the file.
    """
    with naming_file(name), store.open_writer(name) as writer:
        file = AppendedFile(name, writer)
        yield file
        file.flush()


@dataclass(slots=True)
class _Batch:
    """Items that are laid out and written together."""

    nbytes: list[int] = field(default_factory=list)
    kind: list[int] = field(default_factory=list)
    address: list[int] = field(default_factory=list)
    framings: dict[Framing | None, int] = field(default_factory=dict)
    copied: int = 0
    """Bytes of the copies of its payloads."""

    def add(self, framing: Framing | None, nbytes: int, address: int) -> None:
        self.nbytes.append(nbytes)
        self.kind.append(self.framings.setdefault(framing, len(self.framings)))
        self.address.append(address)


class AppendedFile:
    """A file of which each item is written before the next large one must be known.

    Small items are copied, laid out in batches and written together. A large one is written from
    its own memory before `append` returns. So one large payload at a time takes memory.

    Args:
        name: name of the file.
        writer: receives its bytes, from front to back.
    """

    def __init__(self, name: str, writer: Writer) -> None:
        self._name, self._writer = name, writer
        self._end = 0
        self._batch = _Batch()
        self._windows: list[FileWindows] = []
        self._copies = allocate_pages(0)
        self._buffer = allocate_pages(0)

    def append(self, framing: Framing | None, payload: memoryview) -> None:
        """Append an item.

        Args:
            framing: makes the frame around the payload. None appends the bytes without a frame.
            payload: contiguous bytes, which may change once this returns.

        Raises:
            ValueError: the payload has gaps.
            OSError: from the store.
        """
        if not payload.c_contiguous:
            raise ValueError(
                f"a payload must be contiguous, but this one has strides {payload.strides}"
            )
        nbytes, large = payload.nbytes, payload.nbytes >= BLOCK
        address = address_of(payload) if large else self._copy(payload)
        self._batch.add(framing, nbytes, address)
        if large or self._is_full():
            self.flush()

    def flush(self) -> None:
        """Write the items that were collected so far."""
        batch, self._batch = self._batch, _Batch()
        if not batch.nbytes:
            return
        nbytes, kind = np.array(batch.nbytes, np.int64), np.array(batch.kind, np.int64)
        addresses, framings = np.array(batch.address, np.int64), list(batch.framings)
        past_page = np.where(nbytes >= MIN_IN_PLACE_BYTES, addresses % PAGE, 0)
        past_page[past_page % ALIGNMENT != 0] = 0
        framed = np.array([framing is not None for framing in framings])[kind]
        windows = FileWindows(
            self._name,
            lay_out(nbytes, kind, framings, past_page, _MAX_WINDOW_BYTES, self._end),
            MemoryPayloads(addresses),
            np.arange(len(nbytes)),
            nbytes,
            {},
            np.where(framed & (nbytes < BLOCK), 0, addresses),
            in_place=True,
        )
        self._write(windows)
        self._end = windows.layout.nbytes
        self._windows.append(windows)

    def written(self) -> Written:
        """Return where all items are, in the order in which they were appended."""
        files = self._windows
        blocks = _joined([np.diff(file.block) for file in files], np.int64)
        return Written(
            files=(self._name,),
            file=np.zeros(len(blocks), np.int32),
            item=_joined([file.layout.item for file in files], np.int64),
            length=_joined([file.layout.length for file in files], np.int64),
            payload=_joined([file.layout.payload for file in files], np.int64),
            block=np.concatenate([np.zeros(1, np.int64), np.cumsum(blocks)]),
            checksums=_joined([file.checksums for file in files], np.uint32),
            crc=_joined([file.crc for file in files], np.uint32),
        )

    def _is_full(self) -> bool:
        return self._batch.copied + len(self._batch.nbytes) * _FRAME_BYTES >= _BATCH_BYTES

    def _copy(self, payload: memoryview) -> int:
        """Copy a small payload to memory that the caller cannot change, and return its address."""
        if not payload.nbytes:
            return 0
        if not len(self._copies):
            self._copies = allocate_pages(_BATCH_BYTES + _LARGE_BYTES)
        alignment = PAGE if payload.nbytes >= BLOCK else ALIGNMENT
        at = -(-self._batch.copied // alignment) * alignment
        self._copies.data[at : at + payload.nbytes] = payload
        self._batch.copied = at + payload.nbytes
        address: int = self._copies.ctypes.data + at
        return address

    def _write(self, windows: FileWindows) -> None:
        if len(self._buffer) < windows.max_bytes:
            self._buffer = allocate_pages(windows.max_bytes)
        for number in range(windows.count):
            low, high = windows.span(number)
            left = high - low
            for part in windows.make(number, self._buffer):
                self._writer.write(part[:left])
                left -= len(part)


def _joined(parts: list[NDArray[Any]], dtype: type[Any]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *parts])
