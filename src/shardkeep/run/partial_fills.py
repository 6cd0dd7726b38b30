"""What failed attempts to restore may have left in a template.

A load puts tensors in place while it reads, and finds damage on the way. The step that is restored
in the end must fill everything that such an attempt may have filled. Otherwise the state would mix
two steps, and nothing would show it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from shardkeep.checkpoint import commit
from shardkeep.errors import ShardkeepError
from shardkeep.stores.contract import Store

__all__ = ["PartialFills"]


class PartialFills:
    """The names that failed attempts of one rank may have filled.

    Args:
        rank: the rank.
        size: the number of ranks.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank_and_size = rank, size
        self._filled: dict[int, frozenset[str] | None] = {}
        """Step -> the names that it contains; None if they are not known."""

    def add(self, step: int, store: Store, error: Exception | None) -> None:
        """Note that an attempt has failed.

        Args:
            step: the step.
            store: its folder.
            error: what the load of this rank raised; None if this rank had loaded everything.
        """
        try:
            outline = commit.find(store, rank=self._rank_and_size).outline()
            self._filled[step] = frozenset((*outline.tensors.names, *outline.objects.names))
        except (ShardkeepError, OSError) as again:
            # If this error stopped the load as well, the load did not come to any tensor.
            same = type(again) is type(error) and str(again) == str(error)
            self._filled[step] = frozenset() if same else None

    def remaining(self, missing: Sequence[str], skipped: Sequence[str]) -> dict[str, int]:
        """Return what a failed attempt may have filled and a later load left untouched.

        Args:
            missing: the names that the later load did not find: `LoadReport.missing`.
            skipped: the names that it had to skip: `LoadReport.skipped`.

        Returns:
            Flat name -> the newest step that may have filled it.
        """
        found: dict[str, int] = {}
        for step, names in self._filled.items():
            with_prefixes = None if names is None else names | {*_prefixes(names)}
            remaining = [name for name in missing if names is None or _contains(names, name)]
            remaining += [
                name for name in skipped if names is None or name in (with_prefixes or ())
            ]
            found = dict.fromkeys(remaining, step) | found
        return found


def _prefixes(names: Iterable[str]) -> Iterator[str]:
    """Yield the names of the containers around names, such as that of all values of `PerRank`."""
    for name in names:
        while name := name.rpartition(".")[0]:
            yield name


def _contains(names: frozenset[str], name: str) -> bool:
    """Whether a step with these names has this name, or an object that may contain it."""
    return name in names or any(outer in names for outer in _prefixes([name]))
