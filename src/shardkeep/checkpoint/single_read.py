"""Read of a small part of a tensor, without a plan, threads or buffers.

A plan costs as much as hundreds of such reads, so it pays only for many boxes or many bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.checkpoint.chunk_locations import read_range
from shardkeep.errors import Damaged, FormatError
from shardkeep.io.checksums import crc32
from shardkeep.io.read.ranges import describe_mismatch
from shardkeep.plan.reads import ChunkSource, block_range, byte_runs
from shardkeep.settings import BLOCK
from shardkeep.stores.contract import Store
from shardkeep.types import Box, ByteRange

__all__ = ["read_small_part"]

_MAX_BYTES = 1 << 20
"""Larger parts are read in parallel, and past the page cache where that is faster."""


def read_small_part(
    store: Store, name: str, source: ChunkSource, box: Box, into: NDArray[Any], *, verify: bool
) -> bool:
    """Read a box of a chunk, if it is one small range of a file whose blocks have checksums.

    Args:
        store: the checkpoint.
        name: name of the tensor, for errors.
        source: location of the chunk.
        box: the part to read, relative to the chunk; not empty.
        into: an array with the sizes of the box and the tensor's item size.
        verify: whether to check the checksums.

    Returns:
        Whether the box was read. If not, the part is not that simple, or its metadata is
        inconsistent; `read_copies` then reads it or raises an error.

    Raises:
        Damaged: bytes are missing or do not match their checksum.
    """
    checksums, (first, nbytes) = source.checksums, source.payload
    if source.data is not None or checksums is None or len(checksums) != -(-nbytes // BLOCK):
        return False
    try:
        found = byte_runs(source, box, 0)
    except FormatError:
        return False
    low = start = int(found.starts[0])
    high = start + found.span
    if verify:
        low, high = block_range(low, high, source.payload, BLOCK)
    if found.outer or not found.gapless or high - low > _MAX_BYTES:
        return False
    data = memoryview(read_range(store, ByteRange(source.file, low, high - low), name))
    for at in range(low, high, BLOCK) if verify else ():
        block = (at - first) // BLOCK
        crc = crc32(data[at - low : at - low + BLOCK])
        if crc != checksums[block]:
            what = describe_mismatch(crc, int(checksums[block]))
            raise Damaged(what, file=source.file, name=name, block=block)
    into[...] = np.frombuffer(data, into.dtype, box.numel, start - low).reshape(into.shape)
    return True
