"""How long ranks wait for each other."""

from __future__ import annotations

from dataclasses import dataclass

from shardkeep import settings

__all__ = ["Timeouts"]

_SECONDS_WITHOUT_HEARTBEATS = 2.0
"""The interval that `silence_seconds` assumes if no heartbeats are sent."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long ranks wait for each other.

    Attributes:
        deadline_seconds: how long to wait for a message of another rank.
        heartbeat_seconds: the interval between two heartbeats; 0 sends none.
        max_missed_heartbeats: after how many missing heartbeats in a row a rank counts as dead.
    """

    deadline_seconds: float
    heartbeat_seconds: float
    max_missed_heartbeats: int

    @staticmethod
    def from_settings() -> Timeouts:
        """Return the timeouts that the environment variables set."""
        return Timeouts(
            settings.deadline_seconds(),
            settings.heartbeat_seconds(),
            settings.max_missed_heartbeats(),
        )

    @property
    def silence_seconds(self) -> float:
        """How long a rank may be silent before it counts as dead."""
        interval = self.heartbeat_seconds or _SECONDS_WITHOUT_HEARTBEATS
        return interval * self.max_missed_heartbeats
