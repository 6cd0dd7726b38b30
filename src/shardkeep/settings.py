"""Settings, each an environment variable that is read at the time of use; and fixed sizes."""

from __future__ import annotations

import difflib
import math
import os
import warnings
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from shardkeep.util.formatting import parse_bytes

__all__ = [
    "ALIGNMENT",
    "BLOCK",
    "PAGE",
    "SETTINGS",
    "Setting",
    "check_max_host_memory",
    "cores",
    "deadline_seconds",
    "heartbeat_seconds",
    "lease_seconds",
    "max_chunk_bytes",
    "max_host_memory_bytes",
    "max_missed_heartbeats",
    "read_gap_bytes",
    "read_threads",
    "small_tensor_bytes",
    "stop_poll_seconds",
    "write_threads",
]

BLOCK = 256 * 1024
"""Bytes of a payload that one CRC-32 covers. Part of the format, so it cannot be changed."""

ALIGNMENT = 64
"""Payloads start at multiples of this many bytes in their file, as torch's own do."""

PAGE = 4096
"""Large payloads start at multiples of this many bytes: direct I/O demands it, in memory and in
files."""

_PREFIX = "SHARDKEEP_"


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting that users can change.

    Attributes:
        variable: name of the environment variable.
        unit: what the number counts. A number of bytes may have a unit, as in "64MiB".
        default: value while the variable is not set.
        least: smallest value that is accepted.
        meaning: what it does, for the guide.
    """

    variable: str
    unit: Literal["threads", "bytes", "seconds", "heartbeats"]
    default: float
    least: float
    meaning: str

    def value(self) -> float:
        """Return the present value.

        Raises:
            ValueError: the variable is not a number of the unit, or too small.
        """
        _warn_of_unknown_variables()
        text = os.environ.get(self.variable)
        return self.default if text is None else self.parse(text)

    def parse(self, text: str) -> float:
        """Return the value that a text stands for.

        Raises:
            ValueError: as `value`.
        """
        try:
            number = self._number(text)
        except ValueError:
            number = math.nan
        if math.isfinite(number) and number >= self.least:
            return number
        raise ValueError(f"{self.variable} must be {self._expected()}, not {text!r}")

    def _number(self, text: str) -> float:
        if self.unit == "seconds":
            return float(text)
        if self.unit == "bytes":
            try:
                return parse_bytes(text)
            except ValueError:
                pass  # such as "1e9"
        number = float(text)
        return number if number.is_integer() else math.nan

    def _expected(self) -> str:
        least = f"{self.least:g} or more"
        if self.unit == "bytes":
            return f'a number of bytes, {least} (such as {self.default:.0f}, "64MiB" or "1 GB")'
        kind = "a number" if self.unit == "seconds" else "a whole number"
        return f"{kind} of {self.unit}, {least} (such as {self.default:g})"


_READ_THREADS = Setting(
    "SHARDKEEP_READ_THREADS",
    "threads",
    0,
    0,
    "threads that read files, for each process; 0 chooses 1 to 4, by the number of cores and of "
    "ranks on the host",
)
_WRITE_THREADS = Setting(
    "SHARDKEEP_WRITE_THREADS",
    "threads",
    0,
    0,
    "threads that write files, for each process; 0 chooses 1 to 4, by the number of cores and of "
    "ranks on the host, and 1 in the background",
)
_MAX_HOST_MEMORY = Setting(
    "SHARDKEEP_MAX_HOST_MEMORY_BYTES",
    "bytes",
    64 << 20,
    0,
    "bytes of the buffers of one save or load, at least 1 MiB (`max_host_memory=` for one call)",
)
_SMALL_TENSOR = Setting(
    "SHARDKEEP_SMALL_TENSOR_BYTES",
    "bytes",
    64 << 10,
    0,
    "payloads up to this size, at most 256 KiB, are loaded together; 0 loads each on its own",
)
_READ_GAP = Setting(
    "SHARDKEEP_READ_GAP_BYTES",
    "bytes",
    64 << 10,
    0,
    "gaps up to this size are read and discarded instead of starting another read",
)
_MAX_CHUNK = Setting(
    "SHARDKEEP_MAX_CHUNK_BYTES",
    "bytes",
    1 << 30,
    1,
    "a piece of a tensor that is larger is stored as several chunks; must be the same on all ranks",
)
_DEADLINE = Setting(
    "SHARDKEEP_DEADLINE_SECONDS", "seconds", 1800, 0, "how long a rank waits for another rank"
)
_LEASE = Setting(
    "SHARDKEEP_LEASE_SECONDS",
    "seconds",
    300,
    0,
    "how long, at least 1 s, a save on another machine may go without renewing its lease before "
    "its files count as left behind",
)
_STOP_POLL = Setting(
    "SHARDKEEP_STOP_POLL_SECONDS",
    "seconds",
    0.5,
    0,
    "how often, at most every millisecond, a rank checks whether another rank has requested a save",
)
_HEARTBEAT = Setting(
    "SHARDKEEP_HEARTBEAT_SECONDS",
    "seconds",
    1.5,
    0,
    "the interval of each rank's heartbeats; 0 sends none",
)
_MAX_MISSED_HEARTBEATS = Setting(
    "SHARDKEEP_MAX_MISSED_HEARTBEATS",
    "heartbeats",
    5,
    1,
    "how many heartbeats a rank may miss in a row before it counts as dead",
)

SETTINGS: tuple[Setting, ...] = (
    _READ_THREADS,
    _WRITE_THREADS,
    _MAX_HOST_MEMORY,
    _SMALL_TENSOR,
    _READ_GAP,
    _MAX_CHUNK,
    _DEADLINE,
    _LEASE,
    _STOP_POLL,
    _HEARTBEAT,
    _MAX_MISSED_HEARTBEATS,
)
"""All settings, in the order of the guide."""

_warned_of: set[str] = set()


def _warn_of_unknown_variables() -> None:
    """Warn once of each variable that looks like a setting but does not exist."""
    known = {setting.variable for setting in SETTINGS}
    for name in os.environ:
        if not name.startswith(_PREFIX) or name in known or name in _warned_of:
            continue
        _warned_of.add(name)
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        hint = f"did you mean {close[0]}?" if close else "see Settings in the guide for their names"
        warnings.warn(
            f"the environment variable {name} is ignored, as Shardkeep has no such setting; {hint}",
            stacklevel=4,
        )


def cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_threads(ranks_here: int = 1) -> int:
    """Return how many threads read files in one of `ranks_here` processes on this host.

    By default, two for each of its cores and at most four. That is enough for a disk, and the
    interpreter does not serve more of them well.
    """
    return int(_READ_THREADS.value()) or max(1, min(4, 2 * cores() // ranks_here))


def write_threads() -> int:
    """Return how many threads write files in one process; 0 leaves it to the size of the host."""
    return int(_WRITE_THREADS.value())


def max_chunk_bytes() -> int:
    """Return the size above which a piece of a tensor is cut into several chunks.

    Chunks spread a huge tensor over the ranks that hold it, and over files. All ranks that hold the
    same piece must cut it alike, so the value must be the same on all of them.
    """
    return int(_MAX_CHUNK.value())


def max_host_memory_bytes() -> int:
    """Return the bytes that the buffers of one save or load may take in one process."""
    return max(1 << 20, int(_MAX_HOST_MEMORY.value()))


def check_max_host_memory(given: object) -> None:
    """Check the argument `max_host_memory`; None stands for the default.

    Raises:
        ValueError: it is not a number of bytes.
    """
    if given is None:
        return
    if isinstance(given, bool) or not isinstance(given, Integral) or given < 1:
        raise ValueError(f"max_host_memory must be a number of bytes, 1 or more, not {given!r}")


def read_gap_bytes() -> int:
    """Return the largest gap that is read and discarded instead of starting another read."""
    return int(_READ_GAP.value())


def small_tensor_bytes() -> int:
    """Return the largest payload that is loaded together with others, in columns.

    With 0, each is loaded on its own.
    """
    return min(BLOCK, int(_SMALL_TENSOR.value()))


def deadline_seconds() -> float:
    """Return how long a rank waits for another rank before it gives up."""
    return _DEADLINE.value()


def heartbeat_seconds() -> float:
    """Return the interval of a rank's heartbeats; 0 sends none."""
    return _HEARTBEAT.value()


def lease_seconds() -> float:
    """Return how long a save on another machine may go without renewing its lease.

    After that it counts as dead, and its files may be removed. A lease is renewed four times in
    that time.
    """
    return max(1.0, _LEASE.value())


def max_missed_heartbeats() -> int:
    """Return how many heartbeats a rank may miss in a row before it counts as dead.

    A busy interpreter can delay some of them. Up to one more interval passes until the first one is
    missed, and a moment until all other ranks know: with the defaults, a death is known on all
    ranks within 10 s (measured: 8.8 to 9.4 s).
    """
    return int(_MAX_MISSED_HEARTBEATS.value())


def stop_poll_seconds() -> float:
    """Return how often a rank checks whether another one has requested a save.

    Jobs of more than 1,024 ranks check less often, in proportion.
    """
    return max(0.001, _STOP_POLL.value())
