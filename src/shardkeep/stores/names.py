"""Names of files inside a store: relative, with "/", never leaving the folder."""

from __future__ import annotations

import os
from posixpath import normpath

__all__ = ["checked", "checked_range"]


def checked(name: str) -> str:
    """The name in its plain form ("a/./b" and "c/../a/b" are "a/b").

    ".." is resolved here, by letters, and never by the file system, which would follow a symbolic
    link first and so could end up outside of the folder.

    Raises:
        ValueError: empty, absolute, leaving the folder, with a NUL, or not encodable.
    """
    plain = normpath(name) if name else ""
    if not plain or plain == ".":
        reason = "it names no file"
    elif "\0" in plain:
        reason = "it contains a NUL"
    elif plain.startswith("/"):
        reason = "it is absolute"
    elif plain == ".." or plain.startswith("../"):
        reason = "it leaves the folder"
    elif name.endswith(("/", "/.")):
        reason = "it names a folder"
    else:
        try:
            os.fsencode(plain)
        except UnicodeEncodeError:
            reason = "it cannot be encoded"
        else:
            return plain
    raise ValueError(f"bad file name {name!r}: {reason}")


def checked_range(offset: int, length: int) -> None:
    """Refuse negative numbers, which slices and system calls take in different ways."""
    if offset < 0 or length < 0:
        raise ValueError(f"bad range: {length} bytes from offset {offset}")
