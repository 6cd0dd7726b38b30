"""Limits of one case: processor time, memory, and nothing that code from a file would do."""

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
"""Of processor time for one case: other work on the machine does not count."""

MEMORY = 1 << 30
"""Bytes of address space that a process may take beyond what it has when it begins."""

_FORBIDDEN = (
    "os.", "subprocess.", "socket.", "shutil.", "ctypes.dlopen", "exec", "import", "open",
    "pickle.find_class", "marshal.", "webbrowser.", "urllib.", "pty.", "ftplib.", "glob.",
)  # fmt: skip
_HARMLESS = ("os.listdir", "os.scandir", "os.kill", "socket.gethostname")  # of leases


class Forbidden(BaseException):
    """A case did what only code can do."""


class TooLong(BaseException):
    """A case took more than `SECONDS`."""


def limit_memory() -> None:
    """From now on, more than `MEMORY` bytes more are a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


class _Watch:
    active = False
    seen: ClassVar[list[str]] = []


def watch() -> None:
    """Have Python tell of every event that running code needs; see PEP 578."""

    def hook(event: str, args: tuple[object, ...]) -> None:
        if not _Watch.active or not event.startswith(_FORBIDDEN) or event in _HARMLESS:
            return
        if event == "open" and str(args[0]).startswith("/proc/") and args[1] == "r":
            return  # a lease looks at the process
        if event == "import" and str(args[0]) in sys.modules:
            return
        _Watch.seen.append(f"{event} {str(args)[:200]}")

    sys.addaudithook(hook)


@contextmanager
def within_time() -> Iterator[None]:
    """Raises TooLong, or Forbidden for what was done in it."""
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
