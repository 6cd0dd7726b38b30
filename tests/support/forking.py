"""A check that forked processes end."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable

__all__ = ["ends_well"]


def ends_well(work: Callable[[], object], *, seconds: float = 20.0) -> bool:
    """Return whether a process forked here does the work and exits as Python does, in that time."""
    child = os.fork()
    if not child:
        try:
            work()
            threading._shutdown()  # Threads that wait for the end of the program do so here.
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False
