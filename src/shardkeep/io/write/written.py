"""Where the items of a save were written, as columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.io.write.windows import FileWindows
from shardkeep.types import I64

__all__ = ["Written", "collect_written", "take_blocks"]


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """Locations and checksums of N written items, in the order of their payloads."""

    files: tuple[str, ...]
    file: NDArray[np.int32]
    """[N] position in `files`."""
    item: I64
    """[N] offset of the item in its file."""
    length: I64
    """[N] bytes of the item."""
    payload: I64
    """[N] offset of the payload in the file."""
    block: I64
    """[N + 1] rows block[i]:block[i + 1] of `checksums` belong to item i."""
    checksums: NDArray[np.uint32]
    """CRC-32 of each block of each payload."""
    crc: NDArray[np.uint32]
    """[N] CRC-32 of the whole payload."""


def take_blocks(
    counts: I64, checksums: NDArray[np.uint32], rows: I64
) -> tuple[I64, NDArray[np.uint32]]:
    """Return the checksums of some rows, and the position of the first one of each row.

    Args:
        counts: [N] number of checksums of each row.
        checksums: [sum of counts] checksums of all rows.
        rows: [M] the rows to take.

    Returns:
        [M + 1] positions of the first checksum of each row and the end, and the checksums.
    """
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    block = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[rows])])
    inside = np.arange(int(block[-1])) - np.repeat(block[:-1], counts[rows])
    return block, checksums[np.repeat(starts[rows], counts[rows]) + inside]


def collect_written(images: Sequence[FileWindows]) -> Written:
    """Return the locations of all items of some files, in the order of the payloads."""
    counts = [len(image.rows) for image in images]
    order = np.argsort(_joined([image.rows for image in images], np.int64))
    blocks = _joined([np.diff(image.block) for image in images], np.int64)
    checksums = _joined([image.checksums for image in images], np.uint32)
    block, taken = take_blocks(blocks, checksums, order)
    return Written(
        files=tuple(image.name for image in images),
        file=np.repeat(np.arange(len(images), dtype=np.int32), counts)[order],
        item=_joined([image.layout.item for image in images], np.int64)[order],
        length=_joined([image.layout.length for image in images], np.int64)[order],
        payload=_joined([image.layout.payload for image in images], np.int64)[order],
        block=block,
        checksums=taken,
        crc=_joined([image.crc for image in images], np.uint32)[order],
    )


def _joined(parts: Sequence[NDArray[Any]], dtype: type[Any]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *parts])
