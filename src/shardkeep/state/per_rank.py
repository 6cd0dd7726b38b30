"""Which `PerRank` value a rank gets: its own, or, on another number of ranks, a chosen one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from shardkeep.state.markers import key_of, sizes_below
from shardkeep.types import Path

__all__ = ["ChooseRank", "PerRankMode", "PerRankValues"]

PerRankMode = Literal["error", "modulo", "skip"]

ChooseRank = Callable[[str, int, int, int], int | None]
"""Called as (name, rank, number of ranks that load, number of ranks that saved).

Returns the rank whose value this rank gets, or None to leave the value as it is.
"""


def _modulo(name: str, rank: int, size: int, saved_size: int) -> int:
    return rank % saved_size


def _skip(name: str, rank: int, size: int, saved_size: int) -> None:
    return None


_CHOICES: dict[str, ChooseRank] = {"modulo": _modulo, "skip": _skip}


@dataclass(slots=True)
class PerRankValues:
    """Finds the keys of one rank's `PerRank` values in a checkpoint, for `markers.unmarked`.

    Attributes:
        names: all names of the checkpoint.
        rank: the rank that loads.
        size: how many ranks load.
        mode: name of a value -> "error", "skip", "modulo" or a function, for values that another
            number of ranks saved.
        places: the dotted names of the values that were looked up.
        skipped: the names of the values that are left as they are.
        refused: name -> why it cannot be loaded.
    """

    names: Iterable[str]
    rank: int
    size: int
    mode: Callable[[str], str | ChooseRank]
    places: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def key(self, path: Path) -> str | None:
        """Return the key of this rank's value at a path, or None if there is nothing to load.

        Raises:
            ValueError: the mode is unknown, or chose a rank that did not save.
        """
        name = ".".join(map(str, path))
        self.places.append(name)
        sizes = sizes_below(self.names, name)
        if not sizes or self.size in sizes:
            return key_of(
                self.rank, self.size
            )  # The load reports it as missing if it is not there.
        saved_size, mode = max(sizes), self.mode(name)
        if mode == "error":
            self.refused[name] = (
                f"per rank: {_ranks(saved_size)} saved a value each, {_ranks(self.size)} load; "
                f'per_rank="skip" leaves it as it is, "modulo" takes that of rank % {saved_size}, '
                "a function chooses"
            )
            return None
        chosen = _choice(mode)(name, self.rank, self.size, saved_size)
        if chosen is None:
            self.skipped.append(name)
            return None
        if not 0 <= chosen < saved_size:
            raise ValueError(
                f"per_rank chose rank {chosen} for {name!r}: {_ranks(saved_size)} saved it"
            )
        return key_of(chosen, saved_size)

    def contains(self, name: str) -> bool:
        """Return whether a name is part of some rank's value at one of the places."""
        return name.startswith(tuple(f"{place}.rank_" for place in self.places))


def _choice(mode: str | ChooseRank) -> ChooseRank:
    if callable(mode):
        return mode
    if mode not in _CHOICES:
        known = ["error", *sorted(_CHOICES)]
        raise ValueError(f"per_rank must be one of {known} or a function, not {mode!r}")
    return _CHOICES[mode]


def _ranks(count: int) -> str:
    return f"{count} rank{'' if count == 1 else 's'}"
