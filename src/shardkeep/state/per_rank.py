"""Whose value a rank gets: its own, or, on another number of ranks, what a policy says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from shardkeep.state.markers import key_of, sizes_below
from shardkeep.types import Path

__all__ = ["Chooser", "OwnValues"]

Chooser = Callable[[str, int, int, int], int | None]
"""(name, rank, ranks that load, ranks that saved) -> whose value this rank gets; None for none."""


def _modulo(name: str, rank: int, size: int, saved: int) -> int:
    return rank % saved


def _skip(name: str, rank: int, size: int, saved: int) -> None:
    return None


_CHOOSERS: dict[str, Chooser] = {"modulo": _modulo, "skip": _skip}


@dataclass(slots=True)
class OwnValues:
    """Finds the keys of one rank's own values in a checkpoint, for `marks.unmarked`.

    Attributes:
        names: all names of the checkpoint.
        rank, size: who loads, among so many.
        policy: name of a value -> "error", "skip", "modulo", or a `Chooser`: for values that
            another number of ranks saved.
        places: where there were such values.
        skipped: names of those that the policy leaves as they are.
        refused: name -> why it can't be loaded.
    """

    names: Iterable[str]
    rank: int
    size: int
    policy: Callable[[str], str | Chooser]
    places: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def key(self, path: Path) -> str | None:
        """The key of the value for that place; None if there is nothing to load.

        Raises:
            ValueError: the policy is none, or names a rank that there was not.
        """
        name = ".".join(map(str, path))
        self.places.append(name)
        sizes = sizes_below(self.names, name)
        if not sizes or self.size in sizes:
            return key_of(self.rank, self.size)  # if it is not there, it is missing
        saved, policy = max(sizes), self.policy(name)
        if policy == "error":
            self.refused[name] = (
                f"per rank: {_ranks(saved)} saved a value each, {_ranks(self.size)} load; "
                f'per_rank="skip" leaves it as it is, "modulo" takes that of rank % {saved}, '
                "a function chooses"
            )
            return None
        chosen = self._chooser(policy)(name, self.rank, self.size, saved)
        if chosen is None:
            self.skipped.append(name)
            return None
        if not 0 <= chosen < saved:
            raise ValueError(f"per_rank chose rank {chosen} for {name!r}: {_ranks(saved)} saved it")
        return key_of(chosen, saved)

    def _chooser(self, policy: str | Chooser) -> Chooser:
        if callable(policy):
            return policy
        if policy not in _CHOOSERS:
            known = ["error", *sorted(_CHOOSERS)]
            raise ValueError(f"per_rank must be one of {known} or a function, not {policy!r}")
        return _CHOOSERS[policy]

    def others(self, name: str) -> bool:
        """Whether a name belongs to some rank's own value at one of the places."""
        return name.startswith(tuple(f"{place}.rank_" for place in self.places))


def _ranks(count: int) -> str:
    return f"{count} rank{'' if count == 1 else 's'}"
