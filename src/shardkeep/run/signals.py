"""Signals that ask for a save, chained to whoever handled them before."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

__all__ = ["Signals"]


class Signals:
    """Calls `act` when one of some signals arrives, and then what handled it before.

    Args:
        act: called in the signal handler, wherever the main thread happens to be.
    """

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._before: dict[int, Any] = {}

    def install(self, number: int) -> None:
        """Handle a signal from now on. Its default action, such as to end the process, is off.

        Raises:
            ValueError: this is not the main thread, which alone can do so in Python.
            OSError: nobody can handle this signal.
        """
        if number not in self._before:
            self._before[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put back what was there before, where nobody else has taken our place since."""
        for number, before in self._before.items():
            # A handler that was not set from Python can't be put back; off the main thread, none.
            if signal.getsignal(number) == self._handle and before is not None:
                with suppress(ValueError):
                    signal.signal(number, before)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._act()
        before = self._before.get(number)
        if callable(before):
            before(number, frame)
