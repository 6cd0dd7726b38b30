"""What reaches the terminal: escaped, coloured where there is one, and in few writes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from itertools import islice
from typing import TextIO

__all__ = ["CommandError", "Output", "PipeClosed"]

_LINES = 1024
"""Lines a write: early enough for `| head`, and few enough calls for 100,000 lines."""

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


class CommandError(Exception):
    """What was asked for can't be done. The message is one line; `code` the exit code."""

    def __init__(self, message: str, code: int) -> None:
        self.code = code
        super().__init__(message)


class PipeClosed(Exception):
    """The reader of standard output has left. Not an OSError: typer would turn that into exit 1."""


class Output:
    """Standard output: colour on a terminal only (and not where NO_COLOR is set)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self.colour = (
            self._stream.isatty()
            and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM") != "dumb"
        )

    def paint(self, style: str, text: str) -> str:
        """`text` in that style, if there is colour."""
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if self.colour and text else text

    def line(self, text: str = "") -> None:
        self.lines([text])

    def lines(self, lines: Iterable[str]) -> None:
        source = iter(lines)
        while some := list(islice(source, _LINES)):
            try:
                self._stream.write("\n".join(some) + "\n")
            except BrokenPipeError:
                raise PipeClosed from None
