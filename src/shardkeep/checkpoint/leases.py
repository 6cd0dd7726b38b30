"""Leases: which saves are alive, so that what dead ones left can be told from their files.

The coordinator of a save writes a lease before the first data file is made, and removes it when all
is over. A file that carries the id of a save which is not committed and has no live lease belongs
to nobody.

A lease that was written on this machine lives as long as its process: there is one of that pid, and
it began when the lease says. Elsewhere a lease lives as long as it is renewed. Its age is the time
since it was written, by the clock of the store, which also tells what time it is now: it has just
written the lease of whoever asks. So the clocks of hosts do not matter. Where a store does not tell
when it wrote a file, leases of other machines count as alive.

Whoever collects removes the lease first, and whoever commits looks at its own lease just before: a
save that was taken for dead, as its machine was suspended, does not commit files that are gone.
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
_MOST = 4096
"""Bytes of a lease that are looked at: what others wrote may be anything."""
_TRIES = 3
"""To write a lease, while others collect."""
_PROC = Path("/proc")


def lease_name(save_id: str) -> str:
    """The file of that save's lease."""
    return f".lease_{save_id}.json"


def lease_save_id(name: str) -> str | None:
    """The save that a lease's file name belongs to; None if it names no lease."""
    match = _NAME.fullmatch(name)
    return match[1] if match else None


@dataclass(frozen=True, slots=True)
class Holder:
    """A process, so that it is known again.

    Attributes:
        host: its host's name.
        machine: one boot of one machine, and the namespace of the pid: containers have pids of
            their own. Empty where the system does not say.
        pid: its number there.
        started: when it began, in clock ticks after the boot.
    """

    host: str
    machine: str
    pid: int
    started: int

    @staticmethod
    def here() -> Holder:
        """This process."""
        pid = os.getpid()
        found = _process(pid)
        machine = _machine(pid) if found else ""
        return Holder(socket.gethostname(), machine, pid, found[1] if found else 0)

    @staticmethod
    def parse(data: bytes) -> Holder | None:
        """Out of a lease's bytes; None if no save wrote them."""
        try:
            known = json.loads(data)
            holder = Holder(known["host"], known["machine"], known["pid"], known["started"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        kinds = [type(part) for part in (holder.host, holder.machine, holder.pid, holder.started)]
        sane = kinds == [str, str, int, int] and 0 < holder.pid < 1 << 31
        return holder if sane else None

    def ended(self) -> bool | None:
        """Whether the process is gone; None if nobody can tell from here."""
        here = Holder.here()
        # The host, too: machines that were started from one snapshot share the id of their boot.
        if not self.machine or (self.host, self.machine) != (here.host, here.machine):
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # it is there, but somebody else's
        # Nothing to be seen: /proc may hide what others run.
        found = _process(self.pid)
        return found is not None and (found[0] in "ZX" or found[1] != self.started)


def _machine(pid: int) -> str:
    with suppress(OSError):
        if (_PROC / "self").readlink() == Path(str(pid)):  # not that of another namespace
            boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
            return f"{boot} {(_PROC / 'self/ns/pid').readlink()}"
    return ""


def _process(pid: int) -> tuple[str, int] | None:
    """State and start of a process, by fields 3 and 22 of proc_pid_stat(5)."""
    try:
        fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


class Lease:
    """The lease of one save, or of whoever collects. Leaving its block ends it.

    One that nobody holds any more is not renewed, and its file is removed before long: what began
    the save has given it up.

    Args:
        store: where the save goes.
        save_id: its id, of 32 hexadecimal digits.
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
        """Write it; from now on the save's files are its own. On one rank only.

        It appears whole: of one without its holder, nobody could tell that the holder was killed.

        Raises:
            OSError: from the store.
        """
        try:
            self._appear()
        except BaseException:
            # Over a network, an error may come after the fact.
            with suppress(OSError):
                self._store.delete(self._name)
            raise
        self._written = _now()
        self._due = self._written + self._seconds / 4
        self._abandoned = _renewer.add(self, self._store, self._name)

    def _appear(self) -> None:
        for _ in range(_TRIES - 1):
            # Whoever collects just now takes what is not yet renamed for that of a dead save.
            with suppress(FileNotFoundError):
                self._store.put(self._name, _content(self.save_id), mode="replace")
                return
        self._store.put(self._name, _content(self.save_id), mode="replace")

    def confirm(self) -> None:
        """Make sure that nobody has taken this save for dead.

        Raises:
            LeaseLost: somebody has, and may have removed its files.
            OSError: from the store.
        """
        if self._written is not None and _now() - self._written > self._seconds / 2:
            self._renew()

    def time(self) -> float | None:
        """What time it is for the store; None if it does not tell. Raises as `confirm`."""
        if self._store.head(self._name).modified is None:
            return None
        self._renew()
        return self._store.head(self._name).modified

    def rest(self) -> float:
        """Seconds until it is to be renewed."""
        return max(0.0, self._due - _now())

    def keep(self) -> None:
        """Renew it if it is time to, and it has not ended."""
        with self._lock:
            if self._written is None or self.rest():
                return
            # What is wrong here is met again, and told, by the commit.
            with suppress(OSError, LeaseLost):
                self._write_again()

    def release(self) -> None:
        """End it, if it was taken."""
        if self._abandoned is None:
            return
        self._abandoned.detach()
        self._abandoned = None
        _renewer.discard(self)
        with self._lock:  # it may just be renewed
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
                f"{self._store.url}: there was no sign of save {self.save_id} for more than "
                f"{self._seconds:g} s, so another one has removed its files; nothing was committed"
            ) from None
        self._store.put(self._name, _content(self.save_id), mode="replace")
        self._written = _now()


class _Renewer:
    """Renews the leases of this process, by one thread.

    The thread outlives a lease by a quarter of the time that leases live, so that a loop of short
    saves does not start one for each: threads that come and go spread the allocator's memory.
    """

    def __init__(self) -> None:
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._abandoned: deque[tuple[Store, str]] = deque()
        self._changed = Condition()
        self._thread: Thread | None = None

    def add(self, lease: Lease, store: Store, name: str) -> weakref.finalize[..., Lease]:
        """Renew it as long as somebody holds it; what to detach when it ends well."""
        with self._changed:
            self._leases.add(lease)
            if self._thread is None:
                self._thread = Thread(target=self._run, name="shardkeep-lease", daemon=True)
                self._thread.start()
            else:
                self._changed.notify()
        # Collected on any thread, in the midst of anything: nothing more may happen there.
        abandoned = weakref.finalize(lease, self._abandoned.append, (store, name))
        abandoned.atexit = False
        return abandoned

    def discard(self, lease: Lease) -> None:
        """Renew it no longer."""
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
            self._look()

    def _look(self) -> None:
        """One round. It holds leases no longer than it takes."""
        while self._abandoned:
            store, name = self._abandoned.popleft()
            with suppress(Exception):  # of stores of any kind; there is nobody to tell
                store.delete(name)
        with self._changed:
            leases = list(self._leases)
        for lease in leases:
            lease.keep()


_renewer = _Renewer()


def _forget() -> None:
    """In a forked process: the leases are its parent's, and the thread has stayed there."""
    global _renewer  # noqa: PLW0603
    _renewer = _Renewer()


after_fork_in_child(_forget)


def living(store: Store, leases: Iterable[str], time: Callable[[], float | None]) -> frozenset[str]:
    """The saves that may be alive.

    Args:
        leases: the names of their leases.
        time: what time it is for the store, if it tells; asked only where it matters.

    Raises:
        OSError: from the store.
    """
    ids = {name: lease_save_id(name) for name in leases}
    return frozenset(
        save_id for name, save_id in ids.items() if save_id and _lives(store, name, time)
    )


def _lives(store: Store, name: str, time: Callable[[], float | None]) -> bool:
    try:
        holder = Holder.parse(store.get_range(name, 0, _MOST))
        ended = holder.ended() if holder else None
        if ended is not None:
            return not ended
        modified = store.head(name).modified
        if modified is None:
            return True
        now = time()
        return now is None or now - modified <= settings.lease_seconds()
    except FileNotFoundError:  # ended meanwhile
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
    """Seconds that go on while the machine is suspended, where there is such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
