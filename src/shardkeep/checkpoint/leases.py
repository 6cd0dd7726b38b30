"""Leases, which show which saves are alive and so which files are garbage.

The coordinator of a save writes a lease before the first data file, and removes it when the save
has ended. A file with the id of a save that is not committed and has no live lease is garbage.

A lease that was written on this machine lives as long as its process. The process is identified by
its pid and its start time. A lease of another machine lives as long as it is renewed. Its age is
the time since the last renewal by the clock of the store. The current time by that clock is the
modification time of the caller's own lease, which has just been written. So the clocks of the hosts
do not matter. If a store does not report modification times, leases of other machines count as
alive.

Garbage collection removes a lease before the files of its save, and a save checks its own lease
just before it commits. So a save that was taken for dead because its machine was suspended does not
commit files that have been removed.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from threading import Condition, Lock, Thread
from types import TracebackType

from shardkeep import settings
from shardkeep.errors import LeaseLost
from shardkeep.stores.contract import Store
from shardkeep.util.forking import after_fork_in_child

__all__ = ["Holder", "Lease", "lease_name", "lease_save_id", "living"]

_NAME = re.compile(r"\.lease_([0-9a-f]{32})\.json")
_MAX_LEASE_BYTES = 4096
"""Maximum number of bytes that are read of a lease, since the file may contain anything."""
_WRITE_ATTEMPTS = 3
"""Attempts to write a lease while other processes collect garbage."""
_PROC = Path("/proc")


def lease_name(save_id: str) -> str:
    """Return the name of the lease file of a save."""
    return f".lease_{save_id}.json"


def lease_save_id(name: str) -> str | None:
    """Return the save id in the name of a lease file; None if it is not a lease file's name."""
    match = _NAME.fullmatch(name)
    return match[1] if match else None


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a lease, described so that it can be recognized later.

    Attributes:
        host: Host name.
        machine: Boot id and PID namespace, since containers have pids of their own. Empty if the
            system does not provide them.
        pid: Process id in that namespace.
        started: Start time of the process, in clock ticks after the boot.
    """

    host: str
    machine: str
    pid: int
    started: int

    @staticmethod
    def here() -> Holder:
        """Return this process as a holder."""
        pid = os.getpid()
        found = _process(pid)
        machine = _machine(pid) if found else ""
        return Holder(socket.gethostname(), machine, pid, found[1] if found else 0)

    @staticmethod
    def parse(data: bytes) -> Holder | None:
        """Return the holder named in the content of a lease; None if the content is not valid."""
        try:
            known = json.loads(data)
            holder = Holder(known["host"], known["machine"], known["pid"], known["started"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        kinds = [type(part) for part in (holder.host, holder.machine, holder.pid, holder.started)]
        sane = kinds == [str, str, int, int] and 0 < holder.pid < 1 << 31
        return holder if sane else None

    def ended(self) -> bool | None:
        """Return whether the process has ended; None if that cannot be determined from here."""
        here = Holder.here()
        # The host name counts, too: machines started from one snapshot have the same boot id.
        if not self.machine or (self.host, self.machine) != (here.host, here.machine):
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # it exists, and belongs to another user
        # /proc may hide processes of other users, which then count as alive.
        found = _process(self.pid)
        return found is not None and (found[0] in "ZX" or found[1] != self.started)


def _machine(pid: int) -> str:
    with suppress(OSError):
        # false if /proc is mounted from another PID namespace
        if (_PROC / "self").readlink() == Path(str(pid)):
            boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
            return f"{boot} {(_PROC / 'self/ns/pid').readlink()}"
    return ""


def _process(pid: int) -> tuple[str, int] | None:
    """Return the state and the start time of a process: fields 3 and 22 of proc_pid_stat(5)."""
    try:
        fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


class Lease:
    """The lease of one save or one garbage collection; leaving its block releases it.

    If the object is collected without a release, the lease is no longer renewed and its file is
    removed soon after.

    Args:
        store: The folder of the save.
        save_id: The id of the save, 32 hexadecimal digits.
    """

    def __init__(self, store: Store, save_id: str) -> None:
        self.save_id = save_id
        self._store, self._name = store, lease_name(save_id)
        self._seconds = settings.lease_seconds()
        self._lock = Lock()
        self._written: float | None = None
        self._due = 0.0
        self._abandoned: weakref.finalize[..., Lease] | None = None

    def take(self) -> None:
        """Write the lease, which protects the files of the save from now on; on one rank only.

        The file appears in one step: an incomplete lease would not name its holder, so other
        processes could not determine whether the holder has been killed.

        Raises:
            OSError: The store failed.
        """
        try:
            self._write_new()
        except BaseException:
            # Over a network, the lease may have been written despite the error.
            with suppress(OSError):
                self._store.delete(self._name)
            raise
        self._written = _now()
        self._due = self._written + self._seconds / 4
        self._abandoned = _renewer.add(self, self._store, self._name)

    def _write_new(self) -> None:
        for _ in range(_WRITE_ATTEMPTS - 1):
            # A collector may take the temporary file for a dead save's and remove it.
            with suppress(FileNotFoundError):
                self._store.put(self._name, _content(self.save_id), mode="replace")
                return
        self._store.put(self._name, _content(self.save_id), mode="replace")

    def confirm(self) -> None:
        """Make sure that no other process has taken this save for dead.

        Raises:
            LeaseLost: Another process has done so, and may have removed the files.
            OSError: The store failed.
        """
        if self._written is not None and _now() - self._written > self._seconds / 2:
            self._renew()

    def time(self) -> float | None:
        """Return the current time by the clock of the store; None if it does not report times.

        Raises:
            LeaseLost: Another process has taken this save for dead.
            OSError: The store failed.
        """
        if self._store.head(self._name).modified is None:
            return None
        self._renew()
        return self._store.head(self._name).modified

    def rest(self) -> float:
        """Return the number of seconds until the next renewal is due."""
        return max(0.0, self._due - _now())

    def keep(self) -> None:
        """Renew the lease if a renewal is due and the lease has not been released."""
        with self._lock:
            if self._written is None or self.rest():
                return
            # The commit checks the lease again, and then raises the error.
            with suppress(OSError, LeaseLost):
                self._write_again()

    def release(self) -> None:
        """Remove the lease if it was taken."""
        if self._abandoned is None:
            return
        self._abandoned.detach()
        self._abandoned = None
        _renewer.discard(self)
        with self._lock:  # waits for a renewal that is in progress
            self._written = None
        with suppress(OSError):
            self._store.delete(self._name)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _renew(self) -> None:
        with self._lock:
            self._write_again()

    def _write_again(self) -> None:
        self._due = _now() + self._seconds / 4
        try:
            self._store.head(self._name)
        except FileNotFoundError:
            raise LeaseLost(
                f"{self._store.url}: save {self.save_id} did not renew its lease for more than "
                f"{self._seconds:g} s, so another process removed its files; nothing was committed"
            ) from None
        self._store.put(self._name, _content(self.save_id), mode="replace")
        self._written = _now()


class _Renewer:
    """The thread that renews all leases of this process.

    After the last lease has ended, the thread waits for a quarter of the lease time before it ends,
    so that a loop of short saves does not start one thread for each. Frequent new threads would
    fragment the allocator's memory.
    """

    def __init__(self) -> None:
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._abandoned: deque[tuple[Store, str]] = deque()
        self._changed = Condition()
        self._thread: Thread | None = None

    def add(self, lease: Lease, store: Store, name: str) -> weakref.finalize[..., Lease]:
        """Renew a lease as long as the object is referenced; return the finalizer to detach."""
        with self._changed:
            self._leases.add(lease)
            if self._thread is None:
                self._thread = Thread(target=self._run, name="shardkeep-lease", daemon=True)
                self._thread.start()
            else:
                self._changed.notify()
        # The finalizer may run on any thread at any point, so it must do nothing but append.
        abandoned = weakref.finalize(lease, self._abandoned.append, (store, name))
        abandoned.atexit = False
        return abandoned

    def discard(self, lease: Lease) -> None:
        """Stop renewing a lease."""
        with self._changed:
            self._leases.discard(lease)

    def _run(self) -> None:
        idle = False
        while True:
            with self._changed:
                pause = min((lease.rest() for lease in self._leases), default=None)
                if pause is None and idle and not self._abandoned:
                    self._thread = None
                    return
                woken = self._changed.wait(settings.lease_seconds() / 4 if pause is None else pause)
                idle = pause is None and not woken
            self._renew_all()

    def _renew_all(self) -> None:
        """Renew the leases that are due, and remove abandoned ones.

        No reference to a lease outlives the call, so that abandoned leases can be collected.
        """
        while self._abandoned:
            store, name = self._abandoned.popleft()
            with suppress(Exception):  # of any store; there is no caller to report it to
                store.delete(name)
        with self._changed:
            leases = list(self._leases)
        for lease in leases:
            lease.keep()


_renewer = _Renewer()


def _forget() -> None:
    """Start afresh in a forked process: leases and thread belong to the parent."""
    global _renewer  # noqa: PLW0603
    _renewer = _Renewer()


after_fork_in_child(_forget)


def living(store: Store, leases: Iterable[str], time: Callable[[], float | None]) -> frozenset[str]:
    """Return the ids of the saves that may be alive.

    Args:
        store: The folder.
        leases: The names of lease files.
        time: Returns the current time by the clock of the store, or None. Called only if needed.

    Raises:
        OSError: The store failed.
    """
    ids = {name: lease_save_id(name) for name in leases}
    return frozenset(
        save_id for name, save_id in ids.items() if save_id and _is_alive(store, name, time)
    )


def _is_alive(store: Store, name: str, time: Callable[[], float | None]) -> bool:
    try:
        holder = Holder.parse(store.get_range(name, 0, _MAX_LEASE_BYTES))
        ended = holder.ended() if holder else None
        if ended is not None:
            return not ended
        modified = store.head(name).modified
        if modified is None:
            return True
        now = time()
        return now is None or now - modified <= settings.lease_seconds()
    except FileNotFoundError:  # released meanwhile
        return False


def _content(save_id: str) -> bytes:
    here = Holder.here()
    return json.dumps(
        {
            "save_id": save_id,
            "host": here.host,
            "machine": here.machine,
            "pid": here.pid,
            "started": here.started,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
    ).encode()


def _now() -> float:
    """Return a clock's time in seconds that includes suspension, where the system has one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
