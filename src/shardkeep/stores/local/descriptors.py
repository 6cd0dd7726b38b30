"""File descriptors that a KeyboardInterrupt cannot leak."""

from __future__ import annotations

import errno
import io
import os

__all__ = ["Descriptor", "opened"]


class Descriptor(io.FileIO):
    """A file descriptor that is closed with the last reference to it, if not before.

    It has no `__del__` method of Python code: a KeyboardInterrupt inside one is ignored there, and
    the descriptor would stay open. `FileIO` closes it in C.
    """

    _finalizing = False
    """Suppresses FileIO's warning about files that were not closed, which is intended here.

    A Python without this flag ignores the attribute.
    """


def opened(path: str, flags: int) -> Descriptor:
    """Open a file.

    Args:
        path: Path of the file.
        flags: Flags of `os.open`.

    Raises:
        OSError: The file cannot be opened, or it is a folder (EINVAL).
    """
    try:
        # In one call of C code: a Ctrl-C between two calls would lose the descriptor.
        return next(map(Descriptor, map(os.open, [path], [flags], [0o666])))
    except IsADirectoryError as error:
        if isinstance(error.filename, int):  # os.open succeeded, and FileIO did not close it
            os.close(error.filename)
        raise OSError(errno.EINVAL, "not a regular file", path) from None
