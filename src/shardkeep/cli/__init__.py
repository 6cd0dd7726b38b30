"""The command `shardkeep`: look into checkpoints from a shell, without torch."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code.

    Args:
        argv: the arguments behind the command's name; by default those of this process.
    """
    from shardkeep.cli.app import run

    return run(argv)
