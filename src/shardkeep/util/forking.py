"""What a process that is forked from this one has to forget: its parent's threads are not there."""

from __future__ import annotations

import os
from collections.abc import Callable

__all__ = ["in_children"]


def in_children(forget: Callable[[], object]) -> None:
    """Call this in every process that is forked from here on, where there are such."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=forget)
