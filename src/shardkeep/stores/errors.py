"""Errors that stores raise, each made in one place."""

from __future__ import annotations

import errno
import os

__all__ = ["PreconditionFailed", "file_exists", "file_missing", "version_changed"]


class PreconditionFailed(OSError):
    """The file that was to be replaced no longer has the expected version."""


def file_exists(path: str) -> FileExistsError:
    """Return the error for a file that was to be created and exists."""
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)


def file_missing(path: str) -> FileNotFoundError:
    """Return the error for a file that does not exist."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def version_changed(path: str, expected: str, found: str | None) -> PreconditionFailed:
    """Return the error for a file that was to be replaced and has another version by now.

    Args:
        path: The file.
        expected: The version that it should have.
        found: The version that it has; None if it is gone.
    """
    what = "the file is gone" if found is None else f"its version is {found}"
    return PreconditionFailed(errno.ESTALE, f"{what}, not {expected} as expected", path)
