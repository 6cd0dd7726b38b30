"""The contract of a store: what Shardkeep needs from a backend that holds checkpoints.

The verbs are those of obstore. A backend of one's own subclasses `Store`, implements the six
abstract members, and proves itself with `shardkeep.testing.StoreTests`. What only some backends can
do is in `stores.abilities`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Protocol, runtime_checkable

from shardkeep.stores.errors import PreconditionFailed
from shardkeep.stores.types import Buffer, FileInfo, IfMatch, Listing, PutMode, StoreHints

__all__ = [
    "Buffer",
    "FileInfo",
    "IfMatch",
    "Listing",
    "PreconditionFailed",
    "PutMode",
    "Store",
    "StoreHints",
    "Writer",
]


class Writer(Protocol):
    """A new file that is written from front to back. It is durable once its block has ended."""

    def write(self, data: Buffer) -> None:
        """Append all of `data`."""
        ...

    def __enter__(self) -> Writer: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Complete the file; after an exception in the block, remove what was written."""
        ...


@runtime_checkable
class Store(Protocol):
    """A folder of files with relative names, whose parts are separated by "/".

    All methods can be called from several threads. A missing file raises `FileNotFoundError`, a
    name that leaves the folder `ValueError`; other failures are `OSError`s that name the file.

    Example:
        >>> class TestMyStore(shardkeep.testing.StoreTests):  # verifies an implementation
        ...     def make_store(self, folder):
        ...         return MyStore(folder)
        >>> shardkeep.save(state, MyStore("run/step_100"))
    """

    @property
    @abstractmethod
    def url(self) -> str:
        """The name of this store in errors and reports."""
        ...

    @abstractmethod
    def list(self, prefix: str = "", delimiter: Literal["/"] | None = "/") -> Listing:
        """List names below `prefix`, which is empty or ends in "/"; nothing if it is missing.

        With the delimiter, names that have another "/" are summed up as common prefixes, and no
        folder is looked into. With None, all files below the prefix are listed.
        """
        ...

    @abstractmethod
    def head(self, name: str) -> FileInfo:
        """Return the size, version and time of a file."""
        ...

    @abstractmethod
    def get_range(self, name: str, start: int, length: int) -> bytes:
        """Return `length` bytes from `start` on; fewer only where the file ends."""
        ...

    @abstractmethod
    def put(self, name: str, data: Buffer, *, mode: PutMode) -> None:
        """Write a whole file durably and in one step: readers see the old or the new content.

        Raises:
            FileExistsError: The mode is "create", and the file exists.
            PreconditionFailed: The mode is `IfMatch`, and the file has another version or is gone.
        """
        ...

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file. A file that is already gone is not an error."""
        ...

    @property
    def hints(self) -> StoreHints:
        """How this store is best used."""
        return StoreHints()

    def get_ranges(
        self, name: str, starts: Sequence[int], lengths: Sequence[int]
    ) -> Sequence[bytes]:
        """Return many ranges of one file, each as `get_range` does."""
        return [self.get_range(name, *each) for each in zip(starts, lengths, strict=True)]

    def read_into(self, name: str, start: int, buffer: memoryview) -> int:
        """Fill `buffer` from `start` on and return how many bytes there were before the end."""
        view = buffer.cast("B")
        data = self.get_range(name, start, len(view))
        view[: len(data)] = data
        return len(data)

    def open_writer(self, name: str) -> Writer:
        """Start a new file, which may be longer than fits into one request.

        By default its content is collected in memory and put when the block ends.

        Raises:
            FileExistsError: The file exists; raised here or when the block ends.
        """
        from shardkeep.stores.buffered import BufferedWriter

        return BufferedWriter(self, name)

    def sync(self) -> None:
        """Make durable which files were created and deleted so far (POSIX: sync the folders)."""
        return

    def close(self) -> None:
        """Release files, connections and buffers. The store can still be used afterwards."""
        return
