"""Validation of file names in a store: relative, separated by "/", and inside the folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from posixpath import normpath

from shardkeep.stores.contract import Listing

__all__ = ["checked_name", "checked_prefix", "checked_range", "group_names"]


def checked_name(name: str) -> str:
    """Return the name in its normal form ("a/./b" and "c/../a/b" become "a/b").

    ".." is resolved textually and never by the file system. The file system would follow symbolic
    links first, which could lead out of the folder.

    Raises:
        ValueError: The name is empty, is absolute, leaves the folder, contains a NUL, or cannot be
            encoded.
    """
    plain = normpath(name) if name else ""
    if not plain or plain == ".":
        reason = "it does not name a file"
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


def checked_prefix(prefix: str) -> str:
    """Return the prefix of a listing in its normal form: empty, or a folder that ends in "/".

    Raises:
        ValueError: The prefix does not end in "/", or the part before it is not a valid name.
    """
    if not prefix:
        return ""
    if not prefix.endswith("/"):
        raise ValueError(f"bad prefix {prefix!r}: it must be empty or end in '/'")
    return f"{checked_name(prefix[:-1])}/"


def checked_range(start: int, length: int) -> None:
    """Raise ValueError for negative numbers, which slices and system calls treat differently."""
    if start < 0 or length < 0:
        raise ValueError(f"bad range: {length} bytes from offset {start}")


def group_names(names: Iterable[str], prefix: str, delimiter: str | None) -> Listing:
    """Return the listing of a store that has no folders of its own, from the names of its files.

    Args:
        names: The names of all files.
        prefix: A prefix that `checked_prefix` returned.
        delimiter: "/", or None to list all files below the prefix.
    """
    below = [name for name in names if name.startswith(prefix)]
    if delimiter is None:
        return Listing(tuple(below))
    first = {name: name[len(prefix) :].partition(delimiter) for name in below}
    files = tuple(name for name, (_, found, _) in first.items() if not found)
    folders = dict.fromkeys(f"{prefix}{head}/" for head, found, _ in first.values() if found)
    return Listing(files, tuple(folders))
