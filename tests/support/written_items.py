"""A function that writes items to files, for tests that need no tensors of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from shardkeep.io.write.append import append_file
from shardkeep.io.write.written import Written
from shardkeep.stores.contract import Store
from shardkeep.types import Framing


def write_items(
    store: Store, files: Mapping[str, Sequence[tuple[Framing | None, memoryview]]]
) -> Written:
    """Write files with these items; return their locations, file by file, in the given order."""
    parts = []
    for name, items in files.items():
        with append_file(store, name) as file:
            for framing, payload in items:
                file.append(framing, payload)
        parts.append(file.written())

    def joined(name: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(getattr(part, name) for part in parts)])

    counts = np.concatenate([np.zeros(0, np.int64), *(np.diff(part.block) for part in parts)])
    return Written(
        files=tuple(files),
        file=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.item) for part in parts]),
        item=joined("item", np.int64),
        length=joined("length", np.int64),
        payload=joined("payload", np.int64),
        block=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
        checksums=joined("checksums", np.uint32),
        crc=joined("crc", np.uint32),
    )
