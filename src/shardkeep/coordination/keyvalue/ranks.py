"""Ranks that talk through a key-value store, whatever kind of store it is."""

from __future__ import annotations

from functools import partial

from shardkeep.coordination.contract import Ranks
from shardkeep.coordination.keyvalue.contract import KeyValueStore
from shardkeep.coordination.keyvalue.session import KeyValueSession
from shardkeep.coordination.keyvalue.stop_agreement import End, KeyValueStopAgreement
from shardkeep.coordination.keyvalue.timeouts import Timeouts

__all__ = ["KeyValueRanks"]


class KeyValueRanks(Ranks):
    """One rank of them, and who the others are.

    Args:
        keys: this rank's client of it.
        rank: counted among the members.
        members: their global ranks, the coordinator first.
        scope, by_path, timeouts: see `KeyValueSession`.
    """

    def __init__(
        self,
        keys: KeyValueStore,
        rank: int,
        members: tuple[int, ...] | range,
        *,
        scope: str = "",
        by_path: bool = True,
        timeouts: Timeouts | None = None,
    ) -> None:
        self._keys, self._rank, self._members = keys, rank, members
        self._scope, self._by_path, self._timeouts = scope, by_path, timeouts

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._members)

    def session(self, work: str, path: str) -> KeyValueSession:
        return KeyValueSession(
            self._keys,
            self._rank,
            self._members,
            work,
            path,
            scope=self._scope,
            by_path=self._by_path,
            timeouts=self._timeouts,
        )

    def meeting(self, path: str) -> KeyValueStopAgreement:
        begin = partial(self.session, "meeting", path)
        end = End(self._keys, self._rank, self._members, begin, path, timeouts=self._timeouts)
        return KeyValueStopAgreement(end)
