"""Leases live exactly as long as their saves, on this and on other machines."""

from __future__ import annotations

import gc
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardkeep.checkpoint import leases
from shardkeep.checkpoint.garbage import collect_garbage
from shardkeep.checkpoint.leases import Holder, Lease, lease_name, lease_save_id, living
from shardkeep.errors import LeaseLost
from shardkeep.stores import LocalStore, MemoryStore

ID, OTHER = "0" * 31 + "1", "0" * 31 + "2"
ELSEWHERE = Holder("other-host", "another boot", 1, 2)
from support.store_files import names_in


def lease_of(holder: Holder) -> bytes:
    return json.dumps({name: getattr(holder, name) for name in holder.__slots__}).encode()


def put(store, save_id: str, data: bytes, *, age: float = 0.0) -> str:
    name = lease_name(save_id)
    with store.open_writer(name) as sink:
        sink.write(data)
    if age:
        path = store.path / name
        before = path.stat().st_mtime - age
        os.utime(path, (before, before))
    return name


def never() -> float:
    raise AssertionError("the time was read")


@pytest.fixture
def store(tmp_path) -> LocalStore:
    return LocalStore(tmp_path)


def test_names():
    assert lease_save_id(lease_name(ID)) == ID
    for other in (
        ".lease_.json",
        f"a/{lease_name(ID)}",
        lease_name("A" * 32),
        lease_name(ID) + "x",
    ):
        assert lease_save_id(other) is None


def test_a_lease_exists_while_its_block_runs(store):
    with Lease(store, ID) as lease:
        assert list(names_in(store)) == []
        lease.take()
        (name,) = names_in(store)
        assert living(store, [name], never) == {ID}
        document = json.loads(store.get_range(name, 0, 4096))
        assert document["save_id"] == ID
        assert document["pid"] == os.getpid()
    assert list(names_in(store)) == []


def renewers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "shardkeep-lease"]


def test_one_thread_renews_all_leases_and_ends_when_there_are_none(store, monkeypatch):
    monkeypatch.setenv("SHARDKEEP_LEASE_SECONDS", "0.4")
    names = [secrets.token_hex(16) for _ in range(3)]
    leases = [Lease(store, name) for name in names]
    for lease in leases:
        lease.take()
    assert len(renewers()) == 1
    written = [store.head(lease_name(name)).modified for name in names]
    wait_for(
        lambda: all(
            store.head(lease_name(n)).modified > w for n, w in zip(names, written, strict=True)
        )
    )
    for lease in leases:
        lease.release()
    wait_for(lambda: not renewers())
    assert list(names_in(store)) == []


def test_an_abandoned_lease_is_removed(store, monkeypatch):
    monkeypatch.setenv("SHARDKEEP_LEASE_SECONDS", "0.4")
    lease = Lease(store, ID)
    lease.take()
    assert list(names_in(store)) == [lease_name(ID)]
    del lease
    gc.collect()
    wait_for(lambda: not list(names_in(store)))
    assert list(names_in(store)) == []


def test_a_forked_process_leaves_the_leases_of_its_parent_alone(store, monkeypatch):
    monkeypatch.setenv("SHARDKEEP_LEASE_SECONDS", "0.4")
    lease = Lease(store, ID)
    lease.take()
    child = os.fork()
    if not child:
        try:
            del lease
            gc.collect()
            Lease(store, OTHER).take()  # the child's own lease is removed
            time.sleep(1)
            os._exit(0)
        finally:
            os._exit(1)  # otherwise pytest would continue in the child
    assert os.waitpid(child, 0)[1] == 0
    # Not immediately: the parent may just be renewing it, which makes a temporary file.
    wait_for(lambda: list(names_in(store)) == [lease_name(ID)])
    lease.release()


def wait_for(true, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_lease_of_this_machine_depends_on_its_process_not_on_the_clock(store):
    code = "import time\nfrom shardkeep.checkpoint.leases import *\n"
    code += "from shardkeep.stores import LocalStore\n"
    code += f"lease = Lease(LocalStore({str(store.path)!r}), {ID!r}); lease.take()\n"
    code += "print(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        name = lease_name(ID)
        os.utime(store.path / name, (0, 0))
        assert living(store, [name], never) == {ID}
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie
        assert living(store, [name], never) == set()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert living(store, [name], never) == set()


@pytest.mark.parametrize("moment", ["open", "write", "fsync", "replace"])
def test_a_process_killed_while_it_takes_a_lease_leaves_no_live_lease(store, moment):
    """An incomplete lease would keep all files of its save alive for minutes."""
    code = f"""
import os, signal
from shardkeep.checkpoint.leases import Lease
from shardkeep.stores import LocalStore

def audited(*args, real=getattr(os, {moment!r}), **named):
    if {moment!r} == "open":
        real(*args, **named)
    if {moment!r} != "open" or args[1] & os.O_CREAT:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **named)

os.{moment} = audited
Lease(LocalStore({str(store.path)!r}), {ID!r}).take()
"""
    child = subprocess.run([sys.executable, "-c", code], check=False)
    assert child.returncode == -signal.SIGKILL
    (left,) = names_in(store)
    leases = [name for name in names_in(store) if lease_save_id(name)]
    assert living(store, leases, time.time) == set()
    with Lease(store, OTHER) as lease:
        lease.take()
        assert [one.name for one in collect_garbage(store, lease)] == [left]


@pytest.mark.parametrize("times", [1, 2])
def test_a_lease_collected_before_its_rename_is_written_again(store, times):
    class CollectedStore(LocalStore):
        """A store where garbage is collected before a new file is renamed."""

        collections = 0

        def _sync_ancestors(self) -> None:
            if self.collections < times:
                self.collections += 1
                with Lease(store, OTHER) as other:
                    other.take()
                    assert [one.save_id for one in collect_garbage(store, other)] == [ID]

    collected = CollectedStore(store.path)
    with Lease(collected, ID) as lease:
        lease.take()
        assert collected.collections == times
        assert list(names_in(store)) == [lease_name(ID)]
        assert living(store, names_in(store), never) == {ID}


def test_a_lease_that_cannot_be_written_raises(store):
    class Broken(LocalStore):
        def put(self, name, data, *, mode):
            raise FileNotFoundError(name)

    with pytest.raises(FileNotFoundError, match=lease_name(ID)):
        Lease(Broken(store.path), ID).take()


def test_another_process_with_the_same_pid_does_not_count(store):
    here = Holder.here()
    assert here.ended() is False
    older = Holder(here.host, here.machine, here.pid, here.started - 1)
    assert living(store, [put(store, ID, lease_of(older))], never) == set()


def test_processes_of_other_containers_and_machines_are_unknown(store):
    here = Holder.here()
    for holder in (
        Holder(here.host, here.machine + "0", here.pid, here.started - 1),
        Holder("clone", here.machine, here.pid, here.started - 1),
        Holder(here.host, "", here.pid, here.started - 1),
    ):
        assert holder.ended() is None


def test_a_lease_of_another_machine_expires_by_the_clock_of_the_store(store, monkeypatch):
    monkeypatch.setenv("SHARDKEEP_LEASE_SECONDS", "100")
    young = put(store, ID, lease_of(ELSEWHERE), age=90)
    old = put(store, OTHER, lease_of(ELSEWHERE), age=110)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a wrong clock of this host
    with Lease(store, "3" * 32) as lease:
        lease.take()
        assert living(store, [young, old], lease.time) == {ID}


def test_leases_of_other_machines_are_alive_if_the_store_reports_no_times():
    store = MemoryStore()
    with Lease(store, OTHER) as lease:
        lease.take()
        assert lease.time() is None
        assert living(store, [put(store, ID, lease_of(ELSEWHERE))], lease.time) == {ID}


@given(st.binary(max_size=200))
@example(b"")
@example(b"[" * 4096)
@example(b"null")
@example(b'{"host": "h", "machine": "m", "pid": -1, "started": 0}')
@example(b'{"host": "h", "machine": "m", "pid": true, "started": 0}')
@example(b'{"host": "h", "machine": "m", "pid": 1e99, "started": 0}')
@example(b'{"host": [], "machine": "m", "pid": 1, "started": 0}')
@example(b'{"host": "h", "machine": "m", "pid": ' + b"9" * 4000 + b', "started": 0}')
def test_a_lease_with_invalid_content_is_alive_if_the_store_reports_no_times(data):
    assert Holder.parse(data) is None
    store = MemoryStore()
    assert living(store, [put(store, ID, data)], never) == {ID}


def test_a_lease_that_was_removed_meanwhile_is_dead(store):
    assert living(store, [lease_name(ID)], never) == set()


def test_a_lease_is_renewed_until_it_is_released(store, monkeypatch):
    monkeypatch.setenv("SHARDKEEP_LEASE_SECONDS", "1")  # the minimum
    with Lease(store, ID) as lease:
        lease.take()
        path = store.path / lease_name(ID)
        os.utime(path, (1, 1))
        end = time.monotonic() + 20
        while path.stat().st_mtime == 1:
            assert time.monotonic() < end
            time.sleep(0.05)
    assert list(names_in(store)) == []


def test_a_save_that_was_taken_for_dead_is_not_committed(store, monkeypatch):
    with Lease(store, ID) as lease:
        lease.take()
        store.delete(lease_name(ID))
        lease.confirm()  # does not check: the lease was written just now
        now = leases._now()
        monkeypatch.setattr(leases, "_now", lambda: now + 151)
        with pytest.raises(LeaseLost) as caught:
            lease.confirm()
        assert str(caught.value) == (
            f"{store.url}: save {ID} did not renew its lease for more than 300 s, so "
            "another process removed its files; nothing was committed"
        )
    assert list(names_in(store)) == []
