"""Escapes for text that comes from a checkpoint, or names things in it."""

from __future__ import annotations

__all__ = ["escape", "one_line"]


def escape(text: str) -> str:
    """Return `text` with everything unprintable as `\\x1b`, `\\n`, `\\u202e`; and `\\` as `\\\\`.

    Names in a checkpoint may be hostile: printed raw, an escape sequence could rewrite what the
    terminal has shown, a line break could fake a line, and a direction mark could reverse text.
    """
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(
        c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def one_line(text: str) -> str:
    """Return a message as one escaped line; backslashes stay: it may hold escaped names already."""
    return " ".join("\\".join(map(escape, line.split("\\"))) for line in text.splitlines())
