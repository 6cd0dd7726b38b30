"""Waiting in tests, and the only bound on elapsed time that they use."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["PROMPT_SECONDS", "wait_until"]

PROMPT_SECONDS = 45.0
"""Seconds allowed for work that must not wait for a deadline, which is 100 s or more in tests.

Such work usually takes less than a second. The bound allows for a busy machine.
"""


def wait_until(condition: Callable[[], object], seconds: float = PROMPT_SECONDS) -> None:
    """Wait until `condition()` is true.

    Raises:
        TimeoutError: it still is not after that many seconds.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{condition} is still false after {seconds:g} s")
        time.sleep(0.01)
