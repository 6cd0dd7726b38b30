"""Lists of buffers for system calls that read or write several of them (preadv, pwritev)."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["AT_ONCE", "after"]

AT_ONCE = 1024
"""Maximum number of buffers of one call (IOV_MAX of Linux)."""


def after(parts: Sequence[memoryview], done: int) -> list[memoryview]:
    """Return the rest of the buffers after their first `done` bytes."""
    left = list(parts)
    while left and done >= len(left[0]):
        done -= len(left.pop(0))
    if left and done:
        left[0] = left[0][done:]
    return left
