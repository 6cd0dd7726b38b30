"""What a process that is forked from this one has to forget: its parent's threads are not there."""

from __future__ import annotations

import os
from collections.abc import Callable

__all__ = ["after_fork_in_child"]


def after_fork_in_child(forget: Callable[[], object]) -> None:
    """Call this in every process that is forked from here on, where there are such."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=forget)
