"""What a stop agreement keeps in the job's key-value store: key names, values, deletion."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shardkeep.coordination.keyvalue.contract import KeyValueStore

__all__ = ["NEVER", "StopTransport"]

NEVER = 2**63 - 1
"""A boundary that no rank reaches."""
_RECHECK_SECONDS = 0.2
"""Interval at which a waiting thread looks whether its rank leaves."""


class StopTransport:
    """One rank's access to the keys of a stop agreement.

    Rounds are numbered. A round has three kinds of keys: `requested`; `hold/RANK`, the first
    boundary that a rank has not passed; `target`, the boundary at which all ranks stop. Beside them
    are the keys `left/RANK`, one of each rank that has left.

    Args:
        keys: the job's key-value store, through this rank's own client.
        rank: this rank, counted among all.
        size: the number of ranks.
        name: the random name of the agreement, on which all ranks have agreed.
        is_leaving: whether this rank leaves, which ends each wait.
    """

    def __init__(
        self,
        keys: KeyValueStore,
        rank: int,
        size: int,
        name: str,
        is_leaving: Callable[[], bool],
    ) -> None:
        self._keys, self._rank, self._size = keys, rank, size
        self._base = f"shardkeep/stop/{name}"
        self._is_leaving = is_leaving

    # --- requests --------------------------------------------------------------------------------

    def request(self, round_number: int) -> None:
        self._keys.set(self._requested_key(round_number), b"1")

    def is_requested(self, round_number: int) -> bool:
        return self._exists(self._requested_key(round_number))

    # --- holds -----------------------------------------------------------------------------------

    def hold(self, round_number: int, boundary: int) -> None:
        """Publish the boundary at which this rank holds."""
        self._keys.set(self._hold_key(round_number, self._rank), b"%d" % boundary)

    def holds(self, round_number: int) -> list[int] | None:
        """Wait for the boundaries at which all ranks hold; None if this rank leaves before.

        A rank that has left holds at `NEVER`.
        """
        boundaries = []
        for rank in range(self._size):
            key = self._hold_key(round_number, rank)
            found = self._wait([key, self._left_key(rank)])
            if found is None:
                return None
            boundaries.append(int(self._keys.get(key)) if found == key else NEVER)
        return boundaries

    def first_without_hold(self, round_number: int) -> int:
        """Return the first rank that has neither answered nor left; the coordinator if all have."""
        for rank in range(self._size):
            keys = [self._hold_key(round_number, rank), self._left_key(rank)]
            if self._keys.wait(keys, 0) is None:
                return rank
        return 0

    # --- targets ---------------------------------------------------------------------------------

    def set_target(self, round_number: int, boundary: int) -> None:
        """Publish the target, and remove keys that no rank reads any more. For the coordinator.

        All ranks have answered in this round, so they no longer need the keys of the one before.
        """
        self._keys.set(self._target_key(round_number), b"%d" % boundary)
        self._keys.delete([self._hold_key(round_number, rank) for rank in range(self._size)])
        if round_number:
            before = round_number - 1
            self._keys.delete([self._requested_key(before), self._target_key(before)])

    def target(self, round_number: int) -> int | None:
        """Wait for the target; `NEVER` if the coordinator has left, None if this rank leaves."""
        key = self._target_key(round_number)
        found = self._wait([key, self._left_key(0)])
        if found is None:
            return None
        return int(self._keys.get(key)) if found == key else NEVER

    # --- leaving ---------------------------------------------------------------------------------

    def leave(self, round_number: int) -> None:
        """Publish that this rank has left. The last rank to leave removes all keys.

        A rank publishes nothing after this. So the rank that finds that all have left, which is
        the last one at the latest, knows that no key will be set or read any more.
        """
        self._keys.set(self._left_key(self._rank), b"1")
        # The next rank comes first: if all looked at rank 0 first, it would be asked most.
        others = [(self._rank + step) % self._size for step in range(1, self._size)]
        if all(self._exists(self._left_key(rank)) for rank in others):
            # Ranks differ by one round at most, and one that leaves with a target still ahead has
            # begun the next round.
            for number in range(max(0, round_number - 2), round_number + 2):
                holds = [self._hold_key(number, rank) for rank in range(self._size)]
                self._keys.delete([self._requested_key(number), self._target_key(number), *holds])
            self._keys.delete(map(self._left_key, range(self._size)))

    # --- keys ------------------------------------------------------------------------------------

    def _wait(self, keys: Sequence[str]) -> str | None:
        """Wait for the first of the keys; None if this rank leaves before one exists."""
        while True:
            found = self._keys.wait(keys, _RECHECK_SECONDS)
            if found is not None:
                return found
            if self._is_leaving():
                return None

    def _exists(self, key: str) -> bool:
        return self._keys.wait([key], 0) is not None

    def _requested_key(self, round_number: int) -> str:
        return f"{self._base}/{round_number}/requested"

    def _hold_key(self, round_number: int, rank: int) -> str:
        return f"{self._base}/{round_number}/hold/{rank}"

    def _target_key(self, round_number: int) -> str:
        return f"{self._base}/{round_number}/target"

    def _left_key(self, rank: int) -> str:
        return f"{self._base}/left/{rank}"
