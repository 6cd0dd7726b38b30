"""Limits of one case: processor time, memory, and no action that only running code takes."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import ClassVar

__all__ = ["MEMORY", "SECONDS", "Forbidden", "TooLong", "limit_memory", "watch", "within_time"]

SECONDS = 5.0
"""Seconds of processor time for one case."""

MEMORY = 1 << 30
"""Bytes of address space that a process may use beyond those at its start."""

_FORBIDDEN = (
    "os.", "subprocess.", "socket.", "shutil.", "ctypes.dlopen", "exec", "import", "open",
    "pickle.find_class", "marshal.", "webbrowser.", "urllib.", "pty.", "ftplib.", "glob.",
)  # fmt: skip
_HARMLESS = ("os.listdir", "os.scandir", "os.kill", "socket.gethostname")  # of leases


class Forbidden(BaseException):
    """A case did something that only running code can do."""


class TooLong(BaseException):
    """A case took more than `SECONDS`."""


def limit_memory() -> None:
    """Limit the memory of this process to `MEMORY` bytes more than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


class _Watch:
    active = False
    seen: ClassVar[list[str]] = []


def watch() -> None:
    """Add an audit hook (PEP 578) that notes every event that running code causes."""

    def hook(event: str, args: tuple[object, ...]) -> None:
        if not _Watch.active or not event.startswith(_FORBIDDEN) or event in _HARMLESS:
            return
        if event == "open" and str(args[0]).startswith("/proc/") and args[1] == "r":
            return  # a lease checks whether the process runs
        if event == "import" and str(args[0]) in sys.modules:
            return
        _Watch.seen.append(f"{event} {str(args)[:200]}")

    sys.addaudithook(hook)


@contextmanager
def within_time() -> Iterator[None]:
    """Raise `TooLong` or `Forbidden` if the code of the block exceeds a limit."""
    _Watch.seen.clear()
    _Watch.active = True
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        _Watch.active = False
    if _Watch.seen:
        raise Forbidden("; ".join(_Watch.seen))


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong(f"more than {SECONDS} s")


signal.signal(signal.SIGVTALRM, _too_long)
