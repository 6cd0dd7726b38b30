"""Several parts of memory for one call that reads or writes them one after the other."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["AT_ONCE", "after"]

AT_ONCE = 1024
"""Parts that one call takes (IOV_MAX of Linux)."""


def after(parts: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of the parts when the first `done` bytes of them are done."""
    left = list(parts)
    while left and done >= len(left[0]):
        done -= len(left.pop(0))
    if left and done:
        left[0] = left[0][done:]
    return left
