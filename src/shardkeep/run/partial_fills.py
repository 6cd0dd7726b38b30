"""What tries to restore that failed may have left in a template.

A load puts tensors in place as they come, and learns of damage while they do. So the step that is
restored in the end has to fill all that such a try may have filled: otherwise the state would be
of two steps, and nothing would show it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from shardkeep.checkpoint import commit
from shardkeep.errors import ShardkeepError
from shardkeep.stores.contract import Store

__all__ = ["PartialFills"]


class PartialFills:
    """Names that one rank's failed tries may have filled.

    Args:
        rank, size: which rank, of how many.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._who = rank, size
        self._filled: dict[int, frozenset[str] | None] = {}
        """Step -> the names that it holds; None if they are not known."""

    def add(self, step: int, store: Store, error: Exception | None) -> None:
        """A try has failed.

        Args:
            step, store: which step, and where it is.
            error: what this rank's own load raised; None if it had loaded all.
        """
        try:
            outline = commit.find(store, rank=self._who).outline()
            self._filled[step] = frozenset((*outline.tensors.names, *outline.objects.names))
        except (ShardkeepError, OSError) as again:
            # If that is what stopped the load, it had come to no tensor.
            same = type(again) is type(error) and str(again) == str(error)
            self._filled[step] = frozenset() if same else None

    def left(self, missing: Sequence[str], skipped: Sequence[str]) -> dict[str, int]:
        """What of a template is of a try that failed, after another step was loaded into it.

        Args:
            missing, skipped: what that load left untouched: `LoadReport.missing`, `skipped`.

        Returns:
            Flat name -> the newest step that may have filled it.
        """
        found: dict[str, int] = {}
        for step, names in self._filled.items():
            places = None if names is None else names | {*_around(names)}
            mine = [name for name in missing if names is None or _holds(names, name)]
            mine += [name for name in skipped if places is None or name in places]
            found = dict.fromkeys(mine, step) | found
        return found


def _around(names: Iterable[str]) -> Iterator[str]:
    """The places that names stand below: a rank's own value, by the name of all of them."""
    for name in names:
        while name := name.rpartition(".")[0]:
            yield name


def _holds(names: frozenset[str], name: str) -> bool:
    """Whether a step with these names has that one, or an object that it may be inside."""
    return name in names or any(outer in names for outer in _around([name]))
