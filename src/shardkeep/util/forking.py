"""Clean-up in forked processes, which lack their parent's threads."""

from __future__ import annotations

import os
from collections.abc import Callable

__all__ = ["after_fork_in_child"]


def after_fork_in_child(forget: Callable[[], object]) -> None:
    """Call a function in every process that is forked from now on, where processes can fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=forget)
