"""Retries of work that storage may refuse once and accept the next time."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count

__all__ = ["retry"]

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 10.0
"""Each pause is twice as long as the one before."""


def retry(
    work: Callable[[int], None],
    retries: int,
    on_retry: Callable[[int, OSError, float], object] = lambda *_: None,
) -> None:
    """Call a function, and call it again if storage fails.

    Args:
        work: the function. It is given the number of failed attempts, and starts anew each time.
        retries: largest number of repetitions.
        on_retry: called before each pause with the number of the retry, the error, and the length
            of the pause in seconds.

    Raises:
        OSError: the error of the last attempt. Any other exception is raised at once.
    """
    for failed in count():
        try:
            return work(failed)
        except OSError as error:
            if failed >= retries:
                raise
            pause = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2.0**failed)
            on_retry(failed + 1, error, pause)
        time.sleep(pause)
