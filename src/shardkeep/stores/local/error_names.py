"""File names in errors of system calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["naming"]


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Add the path to errors of calls that take a descriptor, which do not contain it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = path
        raise
