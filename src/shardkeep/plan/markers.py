"""Check that ranks agree on the markers in their states (`shardkeep.state.markers`)."""

from __future__ import annotations

from collections.abc import Sequence

from shardkeep.errors import Conflict
from shardkeep.state.flatten import show
from shardkeep.types import Claim, Path

__all__ = ["check_markers", "format_ranks"]


def check_markers(claims: Sequence[Claim]) -> None:
    """Check the markers of all ranks.

    Args:
        claims: the claim of each rank, in order.

    Raises:
        Conflict: a value is marked on one rank and not, or in another way, on another rank that has
            it; or a `Replicated` value differs between ranks.
    """
    marks: dict[Path, tuple[str, int]] = {}
    for rank, claim in enumerate(claims):
        for path, kind in claim.marks.items():
            marks.setdefault(path, (kind, rank))
    if not marks:
        return
    _refuse_unmarked(marks, claims)
    _refuse_different(claims)


def _refuse_unmarked(marks: dict[Path, tuple[str, int]], claims: Sequence[Claim]) -> None:
    checked: set[int] = set()
    for rank, claim in enumerate(claims):
        if id(claim.structure) in checked:  # equal ranks share one object
            continue
        checked.add(id(claim.structure))
        for path, (kind, first) in marks.items():
            if claim.marks.get(path) == kind or not _has(claim, path):
                continue
            other = claim.marks.get(path, "not marked")
            raise Conflict(
                f"{show(path)} is {kind} on rank {first}, but {other} on rank {rank}: mark it "
                "the same way on all ranks that have it; nothing was written"
            )


def _has(claim: Claim, path: Path) -> bool:
    structure = claim.structure
    return path in structure.containers or path in structure.leaves.values()


def _refuse_different(claims: Sequence[Claim]) -> None:
    holders: dict[str, dict[bytes, list[int]]] = {}
    for rank, claim in enumerate(claims):
        for what, digest in claim.content.items():
            holders.setdefault(what, {}).setdefault(digest, []).append(rank)
    for what, groups in holders.items():
        if len(groups) > 1:
            held = " than on ".join(map(format_ranks, groups.values()))
            raise Conflict(
                f"{what} is Replicated, but has other content on {held}; give each rank's its own "
                "name (PerRank), or make them equal; nothing was written"
            )


def format_ranks(ranks: Sequence[int]) -> str:
    """Return ranks as errors name them: "rank 3", "ranks 0, 1"."""
    few = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {few}" if len(ranks) == 1 else f"ranks {few}"
