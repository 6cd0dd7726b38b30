"""Errors that say which file it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["naming"]


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Errors of calls that take a descriptor do not know the file: say which one it was."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = path
        raise
