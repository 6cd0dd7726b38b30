"""Ranks that are threads of one process: for simulation and for tests."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from shardkeep.coordination.keyvalue.memory import MemoryKeyValueStore
from shardkeep.coordination.keyvalue.ranks import KeyValueRanks
from shardkeep.coordination.keyvalue.timeouts import Timeouts
from shardkeep.errors import RankFailed

__all__ = ["run"]

T = TypeVar("T")


def run(
    size: int,
    function: Callable[..., T],
    *args: Any,
    timeouts: Timeouts | None = None,
    keys: MemoryKeyValueStore | None = None,
) -> list[T]:
    """Call `function(ranks, *args)` on `size` ranks at once; the results, in rank order.

    Waits for all of them. Threads cannot be killed, so unless `timeouts` says otherwise there are
    no heartbeats, and a rank that never enters a session is given up after the deadline.

    Raises:
        The error of the rank that failed first, with a note that names the rank. Where ranks only
        passed on what they were told (`RankFailed`), the one they were told about is meant.
    """
    keys = keys if keys is not None else MemoryKeyValueStore()
    timeouts = timeouts or replace(Timeouts.from_settings(), heartbeat_seconds=0.0)
    errors: list[tuple[int, BaseException]] = []

    def one(rank: int) -> T:
        ranks = KeyValueRanks(keys, rank, range(size), timeouts=timeouts)
        try:
            return function(ranks, *args)
        except BaseException as error:
            errors.append((rank, error))
            raise

    with ThreadPoolExecutor(size, thread_name_prefix="rank") as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
    if not errors:
        return [future.result() for future in futures]
    rank, error = min(errors, key=lambda item: isinstance(item[1], RankFailed))
    # What add_note does, which Python 3.10 lacks.
    notes = [*getattr(error, "__notes__", ()), f"raised on rank {rank} of {size}"]
    error.__notes__ = notes  # type: ignore[attr-defined]
    raise error
