"""A writer for stores that can only put whole files."""

from __future__ import annotations

from types import TracebackType

from shardkeep.stores.contract import Buffer, Store, Writer
from shardkeep.stores.errors import file_exists

__all__ = ["BufferedWriter"]


class BufferedWriter(Writer):
    """Collects a file in memory, and puts it when the block ends."""

    def __init__(self, store: Store, name: str) -> None:
        try:
            store.head(name)
        except FileNotFoundError:
            self._store, self._name, self._content = store, name, bytearray()
        else:
            raise file_exists(f"{store.url}/{name}")

    def write(self, data: Buffer) -> None:
        """Append all of `data`."""
        self._content += memoryview(data).cast("B")

    def __enter__(self) -> BufferedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._store.put(self._name, self._content, mode="create")
