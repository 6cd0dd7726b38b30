"""Every constant that one may want to turn, and the environment variable that turns it."""

from __future__ import annotations

import os
from numbers import Integral

__all__ = [
    "ALIGNMENT",
    "BLOCK",
    "PAGE",
    "check_max_host_memory",
    "cores",
    "deadline_seconds",
    "heartbeat_seconds",
    "lease_seconds",
    "mapping",
    "max_chunk_bytes",
    "max_host_memory_bytes",
    "max_missed_heartbeats",
    "ranks_here",
    "read_gap_bytes",
    "read_threads",
    "small_tensor_bytes",
    "stop_poll_seconds",
    "write_threads",
]

BLOCK = 256 * 1024
"""Bytes of a payload that one CRC-32 covers. Part of the format: not to be turned."""

ALIGNMENT = 64
"""Payloads start at multiples of this in their file, as torch's own do."""

PAGE = 4096
"""Large payloads start at multiples of this: what direct I/O asks for in memory and in files."""


def _number(name: str, default: float) -> float:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        return float(text)
    except ValueError:
        what = f"{name} must be a plain number, as {default:g} is, not {text!r}"
        raise ValueError(what) from None


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_threads(ranks_here: int = 1) -> int:
    """Threads that read files, in one process of `ranks_here` on this machine
    (SHARDKEEP_READ_THREADS).

    By default (0) two for each of its cores, 4 at most: enough for a disk, and no more than the
    interpreter serves well.
    """
    wanted = int(_number("SHARDKEEP_READ_THREADS", 0))
    return max(1, wanted or min(4, 2 * cores() // ranks_here))


def max_chunk_bytes() -> int:
    """Bytes of a piece from which on it is cut into several (SHARDKEEP_MAX_CHUNK_BYTES).

    A huge tensor so spreads over the ranks that hold it, and over files. All ranks that hold the
    same piece must cut it alike: the same number on all of them.
    """
    return max(1, int(_number("SHARDKEEP_MAX_CHUNK_BYTES", 1 << 30)))


def write_threads() -> int:
    """Threads that write files, in one process; 0 leaves it to the machine's size
    (SHARDKEEP_WRITE_THREADS).
    """
    return max(0, int(_number("SHARDKEEP_WRITE_THREADS", 0)))


def max_host_memory_bytes() -> int:
    """Bytes of the buffers that one save or load takes, in one process
    (SHARDKEEP_MAX_HOST_MEMORY_BYTES).

    Of a load's, half are for reads past the page cache.
    """
    return max(1 << 20, int(_number("SHARDKEEP_MAX_HOST_MEMORY_BYTES", 64 << 20)))


def check_max_host_memory(given: object) -> None:
    """Refuse a `max_host_memory` that is none; None stands for the default.

    Raises:
        ValueError: no number of bytes; it says what was given.
    """
    if given is None:
        return
    if isinstance(given, bool) or not isinstance(given, Integral) or given < 1:
        raise ValueError(f"max_host_memory must be a number of bytes, 1 or more, not {given!r}")


def ranks_here(size: int) -> int:
    """How many of `size` ranks share this machine, as far as their launcher says."""
    return max(1, min(size, int(_number("LOCAL_WORLD_SIZE", size))))


def read_gap_bytes() -> int:
    """Bytes that are read and thrown away rather than starting a new read
    (SHARDKEEP_READ_GAP_BYTES)."""
    return max(0, int(_number("SHARDKEEP_READ_GAP_BYTES", 64 * 1024)))


def mapping() -> bool:
    """Whether scattered bytes of cached files are taken from a mapping of them (SHARDKEEP_MMAP).

    It is the fastest way to reshard, but a file that is cut short meanwhile kills the process.
    """
    return bool(_number("SHARDKEEP_MMAP", 0))


def small_tensor_bytes() -> int:
    """Bytes of a payload up to which it is loaded with others, in columns
    (SHARDKEEP_SMALL_TENSOR_BYTES).

    0 loads each one on its own; more than `BLOCK` counts as that.
    """
    return max(0, min(BLOCK, int(_number("SHARDKEEP_SMALL_TENSOR_BYTES", 64 * 1024))))


def deadline_seconds() -> float:
    """Seconds that a rank waits for another one before it gives up (SHARDKEEP_DEADLINE_SECONDS)."""
    return _number("SHARDKEEP_DEADLINE_SECONDS", 1800.0)


def heartbeat_seconds() -> float:
    """Seconds between two signs of life of a rank; 0 sends none (SHARDKEEP_HEARTBEAT_SECONDS)."""
    return max(0.0, _number("SHARDKEEP_HEARTBEAT_SECONDS", 1.5))


def lease_seconds() -> float:
    """Seconds without a sign of life after which a save on another machine counts as dead, and its
    files may be removed (SHARDKEEP_LEASE_SECONDS). It gives four signs in that time.
    """
    return max(1.0, _number("SHARDKEEP_LEASE_SECONDS", 300.0))


def max_missed_heartbeats() -> int:
    """Signs of life that a rank may miss, one after the other, before it counts as dead.

    A busy interpreter can delay some of them (SHARDKEEP_MAX_MISSED_HEARTBEATS). One more heartbeat
    can pass until
    the first is missed, and it takes a moment to tell the others: with the defaults a death is
    known on all ranks within 10 s (measured: 8.8 to 9.4 s).
    """
    return max(1, int(_number("SHARDKEEP_MAX_MISSED_HEARTBEATS", 5)))


def stop_poll_seconds() -> float:
    """Seconds between two looks of a rank whether any has asked for a save
    (SHARDKEEP_STOP_POLL_SECONDS).

    Jobs of more than 1,024 ranks look less often, in proportion.
    """
    return max(0.001, _number("SHARDKEEP_STOP_POLL_SECONDS", 0.5))
