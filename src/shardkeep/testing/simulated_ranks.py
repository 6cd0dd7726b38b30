"""Ranks that are threads of one process, for simulation and for tests."""

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
    """Call `function(ranks, *args)` on `size` ranks at once; return the results in rank order.

    The call waits for all ranks. Threads cannot be killed, so by default there are no heartbeats. A
    rank that never enters a session is then given up only after the deadline.

    Args:
        size: The number of ranks.
        function: The function to call.
        *args: Further arguments of the function.
        timeouts: Timeouts of the sessions; by default the settings, without heartbeats.
        keys: The store through which the ranks communicate; by default a new one.

    Raises:
        BaseException: The error of the rank that failed first, with a note that names the rank. A
            `RankFailed`, which only reports the failure of another rank, is raised only if no rank
            raised another error.
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
