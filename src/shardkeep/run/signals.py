"""Signal handlers that request a save, and call the previous handler as well."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

__all__ = ["Signals"]


class Signals:
    """Signal handlers that call a function, and then the handler that was there before.

    Args:
        act: the function. It is called in the signal handler, at any point of the main thread.
    """

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._previous: dict[int, Any] = {}

    def install(self, number: int) -> None:
        """Handle a signal from now on. Its default action does not happen any more.

        Raises:
            ValueError: this is not the main thread, the only one that may install handlers.
            OSError: the signal cannot be handled.
        """
        if number not in self._previous:
            self._previous[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put the previous handlers back, unless somebody else has replaced ours since."""
        for number, previous in self._previous.items():
            # A handler that was not set from Python (None) cannot be put back. Outside of the main
            # thread, no handler can.
            if signal.getsignal(number) == self._handle and previous is not None:
                with suppress(ValueError):
                    signal.signal(number, previous)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._act()
        previous = self._previous.get(number)
        if callable(previous):
            previous(number, frame)
