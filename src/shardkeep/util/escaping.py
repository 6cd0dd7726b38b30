"""Escapes for text from a checkpoint and for the names in it."""

from __future__ import annotations

__all__ = ["escape", "one_line"]


def escape(text: str) -> str:
    r"""Return `text` with unprintable characters as `\x1b`, `\n`, `\u202e`; and `\` as `\\`.

    Names in a checkpoint may be hostile. If they were printed raw, an escape sequence could rewrite
    the terminal, a line break could forge a line, and a direction mark could reverse text.
    """
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(
        c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def one_line(text: str) -> str:
    """Return a message as one escaped line. Backslashes are kept: names may be escaped already."""
    return " ".join("\\".join(map(escape, line.split("\\"))) for line in text.splitlines())
