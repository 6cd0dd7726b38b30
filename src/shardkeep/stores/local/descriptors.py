"""Open files that no Ctrl-C loses."""

from __future__ import annotations

import errno
import io
import os

__all__ = ["Descriptor", "opened"]


class Descriptor(io.FileIO):
    """A file's descriptor, closed with the last reference to it, if not before.

    By C alone: a Ctrl-C that comes while a `__del__` runs is raised there, that is, nowhere, and
    what was to be closed stays open.
    """

    _finalizing = False
    """Hides the flag by which FileIO would warn of files that nobody has closed: here, that is no
    mistake. Where a Python has no such flag, this does nothing."""


def opened(path: str, flags: int) -> Descriptor:
    """Open a file; `flags` as for `os.open`.

    Raises:
        OSError: as from there; also EINVAL for a folder.
    """
    try:
        # In one go of C code: between two calls, a Ctrl-C would lose the number.
        return next(map(Descriptor, map(os.open, [path], [flags], [0o666])))
    except IsADirectoryError as error:
        if isinstance(error.filename, int):  # It was opened, and FileIO leaves it so.
            os.close(error.filename)
        raise OSError(errno.EINVAL, "not a regular file", path) from None
