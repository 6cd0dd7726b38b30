"""What the files of a checkpoint are called, in DCP's way."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["METADATA", "data_file", "data_file_parts", "metadata_rank", "of_ranks"]

METADATA = ".metadata"

_DATA_FILE = re.compile(r"__([0-9]{1,9})_[0-9]+(?:_([0-9a-f]+))?\.distcp")
_PER_RANK = re.compile(r"__([0-9]{1,9})\.metadata")


def data_file(rank: int, number: int, save_id: str) -> str:
    """The name of a data file, never used before. Stock torch loads any name."""
    return f"__{rank}_{number}_{save_id}.distcp"


def data_file_parts(name: str) -> tuple[int, str] | None:
    """The rank that wrote a data file, and the id of its save, which is empty where stock torch
    gave the name; None for any other file."""
    found = _DATA_FILE.fullmatch(name)
    return (int(found[1]), found[2] or "") if found else None


def metadata_rank(name: str) -> int | None:
    """The rank whose own metadata that is (`use_collectives=False`); None for any other file."""
    found = _PER_RANK.fullmatch(name)
    return int(found[1]) if found else None


def of_ranks(names: Iterable[str]) -> list[tuple[int, str]]:
    """Each rank that has metadata of its own among these files, and what it is called: by rank."""
    ranks = ((metadata_rank(name), name) for name in names)
    return sorted((rank, name) for rank, name in ranks if rank is not None)
