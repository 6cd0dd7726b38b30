"""Look-up of committed steps, and removal in an order in which no crash leaves a broken step."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shardkeep as sk
from shardkeep.checkpoint import commit
from shardkeep.checkpoint.leases import Lease
from shardkeep.checkpoint.reader import open_reader
from shardkeep.coordination import detect_ranks
from shardkeep.engine.execution import ForegroundExecution
from shardkeep.engine.options import SaveConfig
from shardkeep.engine.save import run_save
from shardkeep.run import Steps
from shardkeep.run.pruner import Pruner
from shardkeep.run.removal import remove
from shardkeep.stores import LocalStore, MemoryStore
from shardkeep.stores.folders import subfolder
from support.faults import WAYS, Crashed, FaultyStore
from support.store_files import names_in


def state(step: int) -> dict:
    return {"w": torch.full((30, 5), float(step)), "odd": {1, step}, "step": step}


def with_metrics(step: int, store, metrics, **how) -> None:
    """Save a step with metrics, as a manager does."""
    config = SaveConfig(metrics=metrics, **how)
    run_save(lambda: state(step), store, detect_ranks(), config, ForegroundExecution())


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    return LocalStore(tmp_path / "run") if request.param == "local" else MemoryStore("run")


def test_only_committed_steps_are_listed(root):
    steps = Steps(root)
    assert steps.numbers() == [] and steps.latest() is None and steps.best("loss") is None
    for step in (10, 9, 100):
        sk.save(state(step), steps.store(step))
    with pytest.raises(sk.NotACheckpoint):
        sk.open(steps.store(11))
    with subfolder(root, "step_12").open_writer("__0_0_aa.distcp") as sink:  # a save in progress
        sink.write(b"x")
    with subfolder(root, "step_0013").open_writer(".metadata") as sink:  # a similar name only
        sink.write(b"x")
    assert steps.numbers() == [9, 10, 100] and steps.latest() == 100
    assert list(steps.folders()) == [9, 10, 12, 100]
    assert sk.open(steps.store(9))["step"].value == 9


def test_metrics_are_part_of_the_commit(root):
    steps = Steps(root)
    values = {1: 0.5, 2: 0.25, 3: 0.25, 4: 0.75}
    for step, loss in values.items():
        with_metrics(step, steps.store(step), {"loss": loss, f"only {step}": step})
    sk.save(state(5), steps.store(5))
    assert steps.best("loss") == 3 and steps.best("loss", "max") == 4
    assert steps.best("only 2") == 2 and steps.best("other") is None
    assert dict(steps.metrics(4)) == {"loss": 0.75, "only 4": 4.0}
    assert steps.metrics(5) == {} == steps.metrics(77)
    assert [step.number for step in steps.all()] == [1, 2, 3, 4, 5]
    assert open_reader(steps.store(4)).outline.header["metrics"] == {"loss": 0.75, "only 4": 4}
    # A replaced step has new metrics, so no cache may depend on the number of the step alone.
    with_metrics(3, steps.store(3), {"loss": 2.0}, overwrite=True)
    assert steps.metrics(3) == {"loss": 2.0} and steps.best("loss") == 2


def test_an_unreadable_step_is_listed(tmp_path):
    """An unreadable newest step is listed, so that the restore reports it."""
    steps = Steps(tmp_path)
    sk.save(state(1), steps.store(1))
    (tmp_path / "step_2" / ".metadata").mkdir(parents=True)
    assert steps.numbers() == [1, 2]
    with pytest.raises(OSError, match="not a regular file"):
        steps.metrics(2)
    assert "not a regular file" in steps.why_not_whole(2)


def test_linked_steps_are_read_and_never_removed(tmp_path):
    sk.save(state(1), tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step_1").symlink_to(tmp_path / "elsewhere")
    steps = Steps(tmp_path / "run")
    assert steps.numbers() == [1]
    assert steps.folders(links=False) == {}


def test_the_reason_why_a_step_is_incomplete_is_reported(tmp_path):
    steps = Steps(tmp_path)
    sk.save(state(1), steps.store(1))
    assert steps.why_not_whole(1) is None
    assert steps.why_not_whole(2) == "it is not committed"
    (data,) = (tmp_path / "step_1").glob("*.distcp")
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    assert steps.why_not_whole(1) == (
        f"{data.name} has {len(whole) - 1} bytes, but the checkpoint needs {len(whole)} bytes of it"
    )
    data.unlink()
    assert steps.why_not_whole(1) == f"{data.name}: No such file or directory"
    data.write_bytes(whole)
    (manifest,) = (tmp_path / "step_1").glob(".manifest-*")
    manifest.unlink()
    assert "the manifest is missing" in steps.why_not_whole(1)


def test_removing_a_step_removes_all_of_its_files(root):
    steps = Steps(root)
    sk.save(state(1), steps.store(1))
    sk.save(state(2), steps.store(2))
    assert remove(root, "step_1")
    assert list(steps.folders()) == [2] == steps.numbers()
    assert all(name.startswith("step_2/") for name in names_in(root))
    assert not remove(root, "step_1")


def test_checkpoints_of_stock_torch_are_removed(tmp_path):
    import torch.distributed.checkpoint as stock

    stock.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "step_1", no_dist=True)
    assert Steps(tmp_path).numbers() == [1]
    assert remove(LocalStore(tmp_path), "step_1")
    assert list(tmp_path.iterdir()) == []


def test_only_files_of_the_checkpoint_are_removed(tmp_path):
    sk.save(state(1), tmp_path / "step_1")
    kept = tmp_path / "elsewhere"
    kept.write_text("mine")
    (tmp_path / "step_1" / "notes.txt").write_text("mine")
    (tmp_path / "step_1" / "link").symlink_to(kept)
    (tmp_path / "step_1" / "plots" / "__0_0_aa.distcp").parent.mkdir()
    (tmp_path / "step_1" / "plots" / "__0_0_aa.distcp").write_text("mine")
    assert remove(LocalStore(tmp_path), "step_1")
    left = sorted(path.name for path in (tmp_path / "step_1").iterdir())
    assert left == ["link", "notes.txt", "plots"]
    assert kept.read_text() == (tmp_path / "step_1" / "plots" / "__0_0_aa.distcp").read_text()


def test_a_linked_data_file_is_removed_but_not_its_target(tmp_path):
    sk.save(state(1), tmp_path / "step_1")
    (data,) = (tmp_path / "step_1").glob("*.distcp")
    shutil.move(data, tmp_path / "moved")
    data.symlink_to(tmp_path / "moved")
    assert remove(LocalStore(tmp_path), "step_1")
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


@pytest.mark.parametrize("damage", ["cut", "empty", "no manifest"])
def test_an_unreadable_checkpoint_is_not_removed(tmp_path, damage):
    sk.save(state(1), tmp_path / "step_1")
    metadata = tmp_path / "step_1" / ".metadata"
    if damage == "no manifest":
        next((tmp_path / "step_1").glob(".manifest-*")).unlink()
    else:
        metadata.write_bytes(metadata.read_bytes()[:-1] if damage == "cut" else b"")
    before = sorted(path.name for path in (tmp_path / "step_1").iterdir())
    assert not remove(LocalStore(tmp_path), "step_1")
    assert sorted(path.name for path in (tmp_path / "step_1").iterdir()) == before


@pytest.mark.parametrize(("kind", "when"), WAYS)
def test_an_interrupted_removal_leaves_the_step_whole_or_uncommitted(kind, when):
    start = MemoryStore("run")
    sk.save(state(1), subfolder(start, "step_1"))
    files = {name: start.get_range(name, 0, start.head(name).size) for name in names_in(start)}
    ends = []
    for at in range(100):
        inner = MemoryStore("run")
        for name, data in files.items():
            inner.put(name, data, mode="replace")
        store = FaultyStore(inner, at, kind, when)
        with contextlib.suppress(OSError, Crashed):
            remove(store, "step_1")
        if Steps(inner).numbers():
            assert sk.open(subfolder(inner, "step_1")).verify().ok
            assert set(names_in(inner)) == set(files)
        ends.append(len(list(names_in(inner))))
        if len(store.log) <= at:
            break
    assert ends == sorted(ends, reverse=True) and ends[0] == len(files) and ends[-1] == 0
    order = [what for what, _ in store.log if what in ("delete", "sync")]
    assert order == ["delete", "sync", *["delete"] * (len(files) - 1)]


def test_the_commit_record_is_removed_durably_before_any_other_file(tmp_path, monkeypatch):
    sk.save(state(1), tmp_path / "step_1")
    log = []
    unlink, fsync = os.unlink, os.fsync
    monkeypatch.setattr(os, "unlink", lambda path: (log.append(Path(path).name), unlink(path)))
    monkeypatch.setattr(
        os, "fsync", lambda fd: (log.append(str(Path(f"/proc/self/fd/{fd}").readlink())), fsync(fd))
    )
    assert remove(LocalStore(tmp_path), "step_1")
    assert log[:2] == [commit.METADATA, str(tmp_path / "step_1")]
    assert len(log) == 4


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_next_removal_completes_one_that_crashed(tmp_path, when):
    """Files that others have put into the folder are kept."""
    start = MemoryStore("run")
    for step in (1, 2, 3):
        sk.save(state(step), subfolder(start, f"step_{step}"))
    start.put("step_1/notes.txt", b"mine", mode="replace")
    files = {name: start.get_range(name, 0, start.head(name).size) for name in names_in(start)}
    halves = set()
    for at in range(100):
        inner = MemoryStore("run")
        for name, data in files.items():
            inner.put(name, data, mode="replace")
        store = FaultyStore(inner, at, "crash", when)
        with contextlib.suppress(Crashed):
            Pruner(Steps(store), sk.KeepLast(1)).prune(())
        halves.add(len(list(names_in(inner))))
        Pruner(Steps(inner), sk.KeepLast(1)).prune(())
        assert Steps(inner).numbers() == [3]
        left = {name for name in names_in(inner) if not name.startswith("step_3/")}
        assert left == {"step_1/notes.txt"}
        if len(store.log) <= at:
            break
    assert halves == set(range(len(files) // 3 + 1, len(files) + 1))


def test_empty_step_folders_after_a_crash_are_removed(tmp_path):
    sk.save(state(2), tmp_path / "step_2")
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_x").mkdir()
    Pruner(Steps(tmp_path), sk.KeepLast(1)).prune(())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2", "step_x"]


def test_a_step_that_another_job_is_writing_is_not_removed(tmp_path):
    sk.save(state(2), tmp_path / "step_2")
    store = subfolder(LocalStore(tmp_path), "step_1")
    lease = Lease(store, "a" * 32)
    lease.take()
    names = {f"__0_0_{'a' * 32}.distcp", f"__1_0_{'b' * 32}.distcp"}
    for name in names:
        with store.open_writer(name) as sink:
            sink.write(b"x")
    Pruner(Steps(tmp_path), sk.KeepLast(1)).prune(())
    assert f"__0_0_{'a' * 32}.distcp" in set(names_in(store))
    lease.release()
    Pruner(Steps(tmp_path), sk.KeepLast(1)).prune(())
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]


def test_nothing_is_removed_if_no_step_is_whole(tmp_path):
    for step in (1, 2):
        sk.save(state(step), tmp_path / f"step_{step}")
        next((tmp_path / f"step_{step}").glob("*.distcp")).unlink()
    assert Pruner(Steps(tmp_path), sk.KeepLast(1)).prune(()) == ()
    assert Steps(tmp_path).numbers() == [1, 2]
    sk.save(state(0), tmp_path / "step_0")
    assert Pruner(Steps(tmp_path), sk.KeepLast(1)).prune(()) == (1,)
    assert Steps(tmp_path).numbers() == [0, 2]  # the whole one, and the last one
