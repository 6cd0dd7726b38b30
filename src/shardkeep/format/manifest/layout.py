"""The manifest: everything that an index holds, as columns that can be read by range.

The columns of chunks come first in the file, and those that a listing needs last, next to the zip's
directory: listing a checkpoint reads only the end of its manifest.

Columns differ from those of `Index` where that makes them smaller: `tensors.chunks` counts the
chunks of each tensor, `chunks.gap` is where an item starts, counted from the end of the item in
the row before, `chunks.payload` is counted from the item's start (-1: see the item's header),
and `chunks.blocks` counts checksums. `names` lists the tensors, then the objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shardkeep.format.values import Json, loads
from shardkeep.types import I64

__all__ = ["FORMAT", "KINDS", "VERSION", "LazyValues", "too_long"]

FORMAT = "shardkeep manifest"
VERSION = 1
KINDS = ("dict", "list", "OrderedDict")
"""Kinds of containers; columns store positions in this tuple."""

_MAX_PATH = 100
_MEAN_PATH = 64
"""Maximum and mean number of keys of a path: paths share prefixes on disk, not in memory."""


def too_long(depths: I64) -> bool:
    """Return whether paths of these lengths need more memory than a real state does."""
    return bool(
        depths.max(initial=0) > _MAX_PATH or depths.sum() > _MEAN_PATH * (len(depths) + 1000)
    )


class LazyValues(Mapping[str, Json]):
    """The JSON of values by name, parsed on access; invalid JSON raises FormatError."""

    def __init__(self, texts: Mapping[str, bytes], file: str) -> None:
        self._texts, self._file = texts, file

    def __getitem__(self, name: str) -> Json:
        return loads(self._texts[name], file=self._file, place=f"the value of {name!r:.200}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, name: str) -> bytes:
        """Return the text of a value's JSON, b"" if it is not known."""
        return self._texts.get(name, b"")
