"""What a store must provide, and what it may provide besides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from shardkeep.types import I64

__all__ = [
    "Buffer",
    "Folders",
    "Placing",
    "Sink",
    "Store",
    "StoreInRows",
    "StoreInSteps",
    "StoreMapped",
    "StoreWithTimes",
    "Target",
]

Buffer = bytes | bytearray | memoryview


@runtime_checkable
class Store(Protocol):
    """A folder of files, by relative names with "/". Safe to use from several threads.

    Raises `FileNotFoundError` for what is not there, and other `OSError`s as they come.
    """

    @property
    def url(self) -> str:
        """How errors and reports name this store."""
        ...

    def names(self) -> Iterator[str]:
        """The files of the folder and of those below it, in no order; empty if there is none."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file."""
        ...

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset` on: fewer only where the file ends."""
        ...

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset` on; bytes read: fewer only where the file ends."""
        ...

    def create(self, name: str) -> Sink:
        """Begin a file that must not exist yet (`FileExistsError`); makes folders as needed."""
        ...

    def publish(self, name: str, data: Buffer) -> None:
        """Put `data` under `name`, durably and in one step: readers see the old or the new file."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file; one that is already gone is no error."""
        ...

    def sync(self) -> None:
        """Make durable which files were created and removed so far (POSIX: fsync the folders)."""
        ...


@runtime_checkable
class StoreInSteps(Store, Protocol):
    """A store that tells how far a long read has come. Nobody needs to be one: it saves time."""

    def read_steps(
        self, name: str, offset: int, buffer: memoryview, step: int, *, keep: bool = False
    ) -> Iterator[int]:
        """As `read_into`, but yields how many bytes are there, about every `step` bytes.

        What has just come is still in a core's own cache, and is checked or copied best right
        then. `keep`: others want these bytes, too, so they should stay where those find them.
        """
        ...


@runtime_checkable
class StoreInRows(Store, Protocol):
    """A store that reads many short ranges at little more than the cost of their bytes."""

    def read_rows(self, name: str, starts: I64, into: NDArray[np.uint8]) -> bool:
        """Fill `into` [R, L], whose rows are contiguous: row i from byte `starts[i]` [R] on.

        False if that can't be done, or costs more than one read of all between the rows: the caller
        does that, and `into` may hold anything.
        """
        ...


@runtime_checkable
class Folders(Protocol):
    """A store with folders that are there by themselves. In others, names alone make them."""

    def folders(self, *, links: bool = True) -> Iterator[str]:
        """The names of the folders right below, in no order; `links`: those that lead to one, too.

        Empty if there is none.
        """
        ...

    def below(self, folder: str) -> Store:
        """One of them, which need not exist yet, as a store of its own."""
        ...

    def drop(self, folder: str) -> None:
        """Remove one of them if it is a folder and empty; anything else stays as it is."""
        ...


@runtime_checkable
class StoreWithTimes(Store, Protocol):
    """A store that tells when it wrote a file. Nobody needs to be one; see `leases`."""

    def modified(self, name: str) -> float:
        """When a file was last written, in seconds, by the store's own clock."""
        ...


@runtime_checkable
class StoreMapped(Store, Protocol):
    """A store that can show a file as memory."""

    def mapped(self, name: str) -> memoryview | None:
        """All bytes of the file; None where that can't be done, or would be slower than reading.

        Whoever looks at bytes that were cut off the file meanwhile is killed (SIGBUS).
        """
        ...


class Sink(Protocol):
    """A file being written, from front to back. Leaving the block in peace makes it durable."""

    def write(self, data: Buffer) -> None:
        """Append all of `data`."""
        ...

    def __enter__(self) -> Sink: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Sync and close; after an exception close and remove what was written."""
        ...


@runtime_checkable
class Placing(Protocol):
    """A store that can be written at any place of a file. What can't writes front to back."""

    def reserve(self, name: str, nbytes: int) -> Target:
        """Begin a file of so many bytes, which must not exist yet (`FileExistsError`).

        Its space is set aside where the store can: a full disk raises here, not half way.
        """
        ...


class Target(Protocol):
    """A new file of known size. Leaving the block in peace makes it durable."""

    def write_at(self, offset: int, parts: Sequence[memoryview]) -> None:
        """Write all parts, one after the other; several threads may, each in a place of its own.

        `offset`, and the length and the address in memory of each part, are multiples of `PAGE`;
        what goes beyond the size of the file is cut off.
        """
        ...

    def __enter__(self) -> Target: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Sync and close; after an exception close and remove what was written."""
        ...
