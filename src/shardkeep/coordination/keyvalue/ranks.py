"""Ranks that coordinate through a key-value store, whatever kind of store it is."""

from __future__ import annotations

from functools import partial

from shardkeep.coordination.contract import Ranks
from shardkeep.coordination.events import EventSender
from shardkeep.coordination.keyvalue.contract import KeyValueStore
from shardkeep.coordination.keyvalue.session import KeyValueSession
from shardkeep.coordination.keyvalue.stop_agreement import KeyValueStopAgreement
from shardkeep.coordination.keyvalue.timeouts import Timeouts

__all__ = ["KeyValueRanks"]


class KeyValueRanks(Ranks):
    """One rank of a group, which knows the others.

    Args:
        keys: the store, through this rank's own client.
        rank: this rank, counted among the members.
        members: the global ranks of the group, the coordinator first.
        scope: sets jobs or restarts apart that share a store.
        by_path: False lets ranks work together that name the path differently.
        timeouts: how long to wait; None takes it from the settings.
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

    def session(
        self, work: str, path: str, *, events: EventSender | None = None
    ) -> KeyValueSession:
        return KeyValueSession(
            self._keys,
            self._rank,
            self._members,
            work,
            path,
            scope=self._scope,
            by_path=self._by_path,
            timeouts=self._timeouts,
            events=events,
        )

    def stop_agreement(self, path: str) -> KeyValueStopAgreement:
        session = partial(self.session, "stop agreement", path)
        return KeyValueStopAgreement(
            self._keys, self._rank, self._members, session, path, timeouts=self._timeouts
        )
