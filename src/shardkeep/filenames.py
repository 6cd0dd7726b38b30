"""Names of a checkpoint's files, which follow DCP's conventions."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["METADATA", "data_file", "data_file_parts", "metadata_rank", "of_ranks"]

METADATA = ".metadata"

_DATA_FILE = re.compile(r"__([0-9]{1,9})_[0-9]+(?:_([0-9a-f]+))?\.distcp")
_PER_RANK = re.compile(r"__([0-9]{1,9})\.metadata")


def data_file(rank: int, number: int, save_id: str) -> str:
    """Return the name of a data file; the save id makes it unique. Stock torch accepts any name."""
    return f"__{rank}_{number}_{save_id}.distcp"


def data_file_parts(name: str) -> tuple[int, str] | None:
    """Return the rank that wrote a data file and its save id; None for any other file.

    The save id is empty if stock torch chose the name.
    """
    found = _DATA_FILE.fullmatch(name)
    return (int(found[1]), found[2] or "") if found else None


def metadata_rank(name: str) -> int | None:
    """Return the rank whose own metadata a file is (`use_collectives=False`); None for others."""
    found = _PER_RANK.fullmatch(name)
    return int(found[1]) if found else None


def of_ranks(names: Iterable[str]) -> list[tuple[int, str]]:
    """Return (rank, name) of each metadata file of a single rank, sorted by rank."""
    ranks = ((metadata_rank(name), name) for name in names)
    return sorted((rank, name) for rank, name in ranks if rank is not None)
