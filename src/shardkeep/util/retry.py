"""Trying again what storage may refuse once and take the next time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from itertools import count

__all__ = ["tried"]

_log = logging.getLogger(__name__)

_FIRST, _LONGEST = 0.1, 10.0
"""Seconds before the second try, and before any: each waits twice as long as the one before."""


def tried(work: Callable[[int], None], times: int) -> None:
    """Do it; if storage fails, up to so many times more.

    Args:
        work: told how many tries there were before, and starts anew each time.
        times: 0 for one try.

    Raises:
        OSError: of the last try; at once, whatever is none.
    """
    for before in count():
        try:
            return work(before)
        except OSError as error:
            if before >= times:
                raise
            _log.warning("%s; trying again, %d of %d times", error, before + 1, times)
        time.sleep(min(_LONGEST, _FIRST * 2.0**before))
