"""Garbage collection removes the files of dead saves, and no others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint.api import CheckpointException

import shardkeep as sk
from shardkeep import cli
from shardkeep.checkpoint import commit, garbage
from shardkeep.checkpoint.leases import Holder, Lease, lease_name
from shardkeep.checkpoint.reader import open_reader
from shardkeep.format.dcp.trailer import manifest_name
from shardkeep.stores import LocalStore, MemoryStore
from shardkeep.testing import simulated_ranks

A, B = "a" * 32, "b" * 32
STATE = {"w": torch.arange(6.0), "n": 1}
DEAD = Holder("other-host", "another boot", 1, 2)
from support.store_files import names_in


def names(store) -> set[str]:
    return set(names_in(store))


def put(store, *some: str) -> set[str]:
    for name in some:
        with store.open_writer(name) as sink:
            sink.write(b"12345")
    return set(some)


def files(save_id: str, ranks: int = 2) -> list[str]:
    return [*(commit.data_file(r, 0, save_id) for r in range(ranks)), manifest_name(save_id)]


FOREIGN = [
    "__0_0.distcp",
    "__1_0.distcp",
    f"__0_0_{A[:-1]}.distcp",
    f"__0_0_{A.upper()}.distcp",
    f"__0_0_{A}.distcp.bak",
    f"x__0_0_{A}.distcp",
    f"__0_0_{A}_own.distcp",
    f"below/__0_0_{A}.distcp",
    ".metadata.tmp",
    ".metadata.0123456789abcdef.tmp~",
    ".manifest-.npz",
    ".lease_.json",
    "model.bin",
    "notes.txt",
]


def test_the_next_save_removes_the_files_of_a_dead_save_and_nothing_else(tmp_path):
    store = LocalStore(tmp_path)
    others = put(store, *FOREIGN)
    put(store, *files(A), ".metadata.0123456789abcdef.tmp", f"{lease_name(A)}.{'0' * 16}.tmp")
    sk.save(STATE, store)
    save_id = open_reader(store).found.trailer.save_id
    assert names(store) == others | {".metadata", *files(save_id, 1)}
    assert sk.open(store).verify().ok


def test_files_of_a_live_save_are_kept(tmp_path):
    store = LocalStore(tmp_path)
    with Lease(store, A) as lease:
        lease.take()
        live = put(store, *files(A), ".metadata.0123456789abcdef.tmp") | {lease_name(A)}
        put(store, *files(B))
        sk.save(STATE, store)
        assert live <= names(store)
        assert not names(store) & set(files(B))
    sk.save(STATE, store, overwrite=True)
    assert not live & names(store)


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_concurrent_saves_the_first_commit_remains(tmp_path, first, monkeypatch):
    """One waits just before its commit, while the other one saves and collects garbage."""
    publish, waits, goes = commit.publish, threading.Event(), threading.Event()

    def slow(*args, **options):
        if threading.current_thread().name == "slow":
            waits.set()
            assert goes.wait(30)
        publish(*args, **options)

    monkeypatch.setattr(commit, "publish", slow)
    if first:
        sk.save({"w": torch.zeros(3)}, tmp_path)
    errors = []

    def save():
        try:
            sk.save(STATE, tmp_path, overwrite=True)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=save, name="slow")
    thread.start()
    assert waits.wait(30)
    sk.save({"w": torch.ones(4)}, tmp_path, overwrite=True)
    assert sk.open(tmp_path).read("w").tolist() == [1] * 4
    goes.set()
    thread.join()
    assert [type(error) for error in errors] == [sk.Replaced]
    assert sk.open(tmp_path).verify().ok
    assert sk.open(tmp_path).read("w").tolist() == [1] * 4
    left = {one.name for one in tmp_path.iterdir()}
    save_id = open_reader(tmp_path).found.trailer.save_id
    assert left == {".metadata", *files(save_id, 1)}


def test_saving_from_fewer_ranks_leaves_no_stale_shard(tmp_path):
    def save(job):
        sk.save({f"w{job.rank}": torch.ones(3)}, tmp_path, ranks=job, overwrite=True)

    for ranks in (4, 2):
        simulated_ranks.run(ranks, save)
    save_id = open_reader(tmp_path).found.trailer.save_id
    assert {one.name for one in tmp_path.iterdir()} == {".metadata", *files(save_id)}


def test_a_save_removes_its_lease_whether_it_succeeds_or_fails(tmp_path):
    sk.save(STATE, tmp_path / "well")
    with pytest.raises(sk.Conflict):
        sk.save({"a.b": 1, "a": {"b": 2}}, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    (tmp_path / "full").mkdir()
    store = LocalStore(tmp_path / "full")

    def full(name, nbytes):
        raise OSError(28, "No space left on device", name)

    store.open_positioned_writer = full
    with pytest.raises(OSError, match="No space"):
        sk.save(STATE, store)
    assert names(store) == set()
    assert not [name for name in names(LocalStore(tmp_path)) if "lease" in name]


def test_nothing_is_garbage_beside_an_unreadable_record(tmp_path):
    store = LocalStore(tmp_path)
    sk.save(STATE, store)
    put(store, *files(A))
    record = (tmp_path / ".metadata").read_bytes()
    (tmp_path / ".metadata").write_bytes(record[:-1])
    assert garbage.find_garbage(store, time.time) == []
    (tmp_path / ".metadata").write_bytes(record)
    assert {one.name for one in garbage.find_garbage(store, time.time)} == set(files(A))


def test_checkpoints_of_single_ranks_are_kept(tmp_path):
    import shardkeep.dcp as dcp

    writer = dcp.FileSystemWriter(tmp_path)
    dcp.save(STATE, storage_writer=writer, use_collectives=False)
    own = names(LocalStore(tmp_path))
    assert {"__0.metadata"} < own
    assert not [name for name in own if name.startswith(".lease")]
    sk.save(STATE, tmp_path / "x")
    for name in (".metadata", *files(open_reader(tmp_path / "x").found.trailer.save_id, 1)):
        (tmp_path / "x" / name).rename(tmp_path / name)  # takes precedence over __0.metadata
    assert garbage.find_garbage(LocalStore(tmp_path), time.time) == []


def test_a_checkpoint_with_a_custom_record_name_is_kept(tmp_path):
    """A writer of the user's may name the record as it likes, so other saves do not find it."""
    import shardkeep.dcp as dcp

    class Writer(dcp.FileSystemWriter):
        def _get_metadata_path(self, rank=None):
            return self.fs.concat_path(self.path, "record")

    dcp.save(STATE, storage_writer=Writer(tmp_path))
    own = names(LocalStore(tmp_path))
    assert len(own) == 2
    sk.save(STATE, tmp_path)
    assert own < names(LocalStore(tmp_path))


def test_a_dcp_writer_holds_a_lease_until_it_has_finished(tmp_path):
    import shardkeep.dcp as dcp

    seen = []

    class Writer(dcp.FileSystemWriter):
        def write_data(self, plan, planner):
            seen.append([name for name in names(LocalStore(tmp_path)) if name.startswith(".lease")])
            if fail:
                raise OSError("no")
            return super().write_data(plan, planner)

    fail = False
    dcp.save(STATE, storage_writer=Writer(tmp_path))
    fail = True
    with pytest.raises(CheckpointException):
        dcp.save(STATE, storage_writer=Writer(tmp_path))
    fail = False
    put(LocalStore(tmp_path), *files(A))
    stock.save(STATE, storage_writer=Writer(tmp_path), no_dist=True)
    assert [len(one) for one in seen] == [1, 1, 1]
    left = names(LocalStore(tmp_path))
    assert not [name for name in left if name.startswith(".lease")]
    assert not left & set(files(A))


@given(st.sets(st.sampled_from([*FOREIGN, *files(A), *files(B), lease_name(A), lease_name(B)])))
def test_only_files_of_dead_saves_are_found(some):
    store = MemoryStore()
    put(store, *some - {lease_name(A)})
    if lease_name(A) in some:
        with store.open_writer(lease_name(A)) as sink:
            here = Holder.here()
            gone = {"host": here.host, "machine": here.machine, "pid": here.pid, "started": 0}
            sink.write(json.dumps(gone).encode())
    # The lease of B names no process, and this store reports no times, so B is alive.
    expected = set(some) & {*files(A), lease_name(A)}
    if lease_name(B) not in some:
        expected |= set(some) & set(files(B))
    with Lease(store, "c" * 32) as lease:
        lease.take()
        assert {one.name for one in garbage.find_garbage(store, lease.time)} == expected
        assert {one.name for one in garbage.collect_garbage(store, lease)} == expected
    assert names(store) == some - expected


KILLED = """
import os, signal, torch
import shardkeep as sk
from shardkeep.checkpoint import commit
commit.publish = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
sk.save({"w": torch.ones(4)}, PATH, overwrite=True)
"""


def test_gc_lists_the_files_of_a_killed_save_and_removes_them_on_request(tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "run" / "other"
    sk.save(STATE, run)
    sk.save(STATE, other)
    whole = {name: (run / name).read_bytes() for name in names(LocalStore(run))}
    code = KILLED.replace("PATH", repr(str(run)))
    killed = subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ})
    assert killed.returncode == -signal.SIGKILL
    put(LocalStore(other), *files(B, 1))
    left = sorted(names(LocalStore(run)) - whole.keys())
    kinds = [name.split("_")[0].split("-")[0] for name in left]
    assert kinds == [".lease", "", "other/.manifest", "other/"]

    assert cli.main(["gc", str(run), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["path"] for one in listed["files"]] == [str(run / name) for name in left]
    assert listed["removed"] is False
    assert listed["nbytes"] == sum((run / name).stat().st_size for name in left)
    assert cli.main(["gc", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"       5 B  {run / left[-1]}" in out
    assert "4 files, " in out
    assert "pass --delete to remove them" in out
    assert sorted(names(LocalStore(run)) - whole.keys()) == left

    assert cli.main(["gc", str(run), "--delete"]) == 0
    assert "removed 4 files, " in capsys.readouterr().out
    assert {name: (run / name).read_bytes() for name in names(LocalStore(run))} == whole
    assert cli.main(["gc", str(run), "--delete"]) == 0
    assert capsys.readouterr().out == f"{run}: no files of dead saves\n"
    assert cli.main(["gc", str(run / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err
