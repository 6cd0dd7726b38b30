"""Names of data files. A name from a checkpoint is hostile until it passes this check."""

from __future__ import annotations

from shardkeep.errors import FormatError

__all__ = ["safe_file_name"]

MAX_NAME = 4096
"""Maximum bytes of a name, as POSIX has it for paths."""


def safe_file_name(name: str, *, file: str | None = None) -> str:
    """Return the name of a data file, relative to the checkpoint, without empty parts and ".".

    Args:
        name: as a checkpoint gives it.
        file: the file that contains the name, for the error.

    Raises:
        FormatError: the name leaves the checkpoint's folder (absolute, "..", a drive), means
            different files on different systems (a backslash), or cannot be a file's name at all.
    """
    shown = repr(name if len(name) <= 100 else name[:97] + "...")
    try:
        encoded = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise FormatError(f"file name {shown} is not valid Unicode", file=file) from None
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or "\0" in name or len(encoded) > MAX_NAME or name.endswith("/"):
        raise FormatError(f"file name {shown} cannot name a file", file=file)
    if name.startswith("/") or ".." in parts or "\\" in name or parts[0][1:2] == ":":
        raise FormatError(f"file name {shown} leaves the checkpoint's folder", file=file)
    return "/".join(parts)
