"""Optional abilities of stores. They make a store faster; nothing requires them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from shardkeep.stores.contract import Store
from shardkeep.types import I64

__all__ = [
    "PositionedWriter",
    "SupportsFolders",
    "SupportsPositionedWrites",
    "SupportsReadRows",
    "SupportsReadSteps",
]


@runtime_checkable
class SupportsReadSteps(Store, Protocol):
    """A store that reports how far a long read has come."""

    def read_steps(
        self, name: str, start: int, buffer: memoryview, step: int, *, keep: bool = False
    ) -> Iterator[int]:
        """Fill `buffer` from `start` on, and yield how many bytes it holds, about every `step`.

        The newest bytes are still in the core's own cache, where they are checked and copied at
        the lowest cost. `keep` says that other readers want these bytes, too, so they should stay
        in the page cache.
        """
        ...


@runtime_checkable
class SupportsReadRows(Store, Protocol):
    """A store that reads many short ranges at little more than the cost of their bytes."""

    def read_rows(self, name: str, starts: I64, into: NDArray[np.uint8]) -> bool:
        """Fill `into` [R, L], whose rows are contiguous: row i from byte `starts[i]` [R] on.

        Returns:
            False if this is not possible, or slower than one read of everything between the rows.
            The caller then does the latter; the content of `into` is undefined.
        """
        ...


class PositionedWriter(Protocol):
    """A new file of known size. It is durable once its block has ended."""

    def write_at(self, offset: int, parts: Sequence[memoryview]) -> None:
        """Write all parts one after the other, from `offset` on.

        Several threads may do so at once, in different places. The offset, and the length and
        address in memory of each part, are multiples of `PAGE`; bytes beyond the size of the file
        are cut off.
        """
        ...

    def __enter__(self) -> PositionedWriter: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Complete the file; after an exception in the block, remove what was written."""
        ...


@runtime_checkable
class SupportsPositionedWrites(Protocol):
    """A store whose files can be written at any position (`StoreHints.positioned_writes`)."""

    def open_positioned_writer(self, name: str, nbytes: int) -> PositionedWriter:
        """Start a new file of `nbytes` bytes.

        Its space is reserved where the store can do that: a full disk raises here, not half way.

        Raises:
            FileExistsError: The file exists.
        """
        ...


@runtime_checkable
class SupportsFolders(Protocol):
    """A store whose folders exist by themselves. In others, the names of files imply them."""

    def is_link(self, folder: str) -> bool:
        """Return whether a folder is a symbolic link to one elsewhere."""
        ...

    def subfolder(self, folder: str) -> Store:
        """Return a folder, which need not exist yet, as a store of its own."""
        ...

    def remove_folder(self, folder: str) -> None:
        """Remove a folder if it is empty. Links, files and other folders stay."""
        ...
