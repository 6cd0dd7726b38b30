"""A store in memory that fails or crashes at one operation, in the form that tests use."""

from __future__ import annotations

import errno
from typing import Literal

from shardkeep.stores import MemoryStore
from shardkeep.testing import Crashed, Fault, fail_at
from shardkeep.testing import FaultyStore as PlannedStore

__all__ = ["WAYS", "Crashed", "FaultyStore"]

WAYS = [(kind, when) for kind in ("error", "crash") for when in ("before", "after")]


class FaultyStore(PlannedStore):
    """A store that forwards everything to `inner` until operation number `at` (from 0)."""

    inner: MemoryStore

    def __init__(
        self,
        inner: MemoryStore,
        at: int = -1,
        kind: Literal["error", "crash"] = "error",
        when: Literal["before", "after"] = "before",
        error: int = errno.ENOSPC,
    ) -> None:
        super().__init__(inner, fail_at(at, Fault(kind, when, error)))
