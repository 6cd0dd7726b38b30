"""Ranks that talk through a key-value store, whatever kind of store it is."""

from __future__ import annotations

from functools import partial

from shardkeep.coordination.contract import Ranks
from shardkeep.coordination.keyvalue.heartbeat import Timing
from shardkeep.coordination.keyvalue.keys import KeyValue
from shardkeep.coordination.keyvalue.session import KeySession
from shardkeep.coordination.keyvalue.stop_agreement import End, KeyValueStopAgreement

__all__ = ["KeyRanks"]


class KeyRanks(Ranks):
    """One rank of them, and who the others are.

    Args:
        keys: this rank's client of it.
        rank: counted among the members.
        members: their global ranks, the coordinator first.
        scope, by_path, timing: see `KeySession`.
    """

    def __init__(
        self,
        keys: KeyValue,
        rank: int,
        members: tuple[int, ...] | range,
        *,
        scope: str = "",
        by_path: bool = True,
        timing: Timing | None = None,
    ) -> None:
        self._keys, self._rank, self._members = keys, rank, members
        self._scope, self._by_path, self._timing = scope, by_path, timing

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._members)

    def session(self, work: str, path: str) -> KeySession:
        return KeySession(
            self._keys,
            self._rank,
            self._members,
            work,
            path,
            scope=self._scope,
            by_path=self._by_path,
            timing=self._timing,
        )

    def meeting(self, path: str) -> KeyValueStopAgreement:
        begin = partial(self.session, "meeting", path)
        end = End(self._keys, self._rank, self._members, begin, path, timing=self._timing)
        return KeyValueStopAgreement(end)
