"""`async_save` saves the state of the call, loses no save, and leaves nothing behind."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import torch.distributed as dist
import torch.distributed.checkpoint as stock
import torch.distributed.checkpoint.staging as stock_staging
from torch.distributed.checkpoint.api import CheckpointException

import shardkeep as sk
import shardkeep.dcp as dcp
from shardkeep.dcp import staging, state_dict_saver
from shardkeep.dcp.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from support import dcp_async
from support.dcp_async import Gate, held
from support.scenarios import blank, equal, values
from support.waiting import PROMPT_SECONDS

pytestmark = [pytestmark, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

TYPES = list(AsyncCheckpointerType)


class Box:
    """An object that contains a tensor."""

    def __init__(self, number: int) -> None:
        self.number, self.tensor = number, torch.full((2,), float(number))


def state() -> dict:
    w = values("w", (5, 3), torch.float32)
    return {
        "w": w.clone(),
        "columns": w.clone().t(),
        "half": values("h", (4,), torch.bfloat16).clone(),
        "flags": torch.tensor([True, False]),
        "conj": values("c", (3,), torch.complex64).clone().conj(),
        "nested": {"list": [torch.zeros(2), {"deep": [1, 2]}], "numbers": [3, 4]},
        "group": {"lr": 0.5, "betas": (0.9, [1])},
        "sparse": torch.eye(3).to_sparse(),
        "pair": (torch.zeros(2), [5]),
    }


def change(made: dict) -> None:
    for name in ("w", "columns", "half"):
        made[name].fill_(7)
    made["flags"].logical_not_()
    made["conj"].zero_()
    made["sparse"].mul_(3)
    made["nested"]["list"][0].fill_(7)
    made["nested"]["list"][1]["deep"].append(7)
    made["nested"]["numbers"][0] = 7
    made["nested"]["new"] = 7
    made["group"]["lr"] = 7
    made["group"]["betas"][1][0] = 7
    made["pair"][0].fill_(7)
    made["pair"][1].append(7)
    del made["half"]


def dense(made: dict) -> dict:
    """Return the state with tensors that can be compared."""
    shown = {**made, "conj": made["conj"].resolve_conj()}
    return shown | {n: v.to_dense() for n, v in made.items() if n == "sparse"}


def stagers(path) -> dict:
    found = {
        "none": {},
        "blocking": {"async_stager": stock_staging.BlockingAsyncStager()},
        "the writer": {"storage_writer": dcp.FileSystemWriter(path)},
        "torch's writer": {"storage_writer": stock.FileSystemWriter(path)},
        "kept": {"storage_writer": dcp.FileSystemWriter(path, cache_staged_state_dict=True)},
    }
    if hasattr(stock_staging, "DefaultStager"):
        for name, later in (("default", False), ("later", True)):
            options = stock_staging.StagingOptions(False, False, later, False)
            found[name] = {"async_stager": stock_staging.DefaultStager(options)}
    return found


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    "stager", ["none", "blocking", "the writer", "torch's writer", "kept", "default", "later"]
)
def test_later_changes_are_not_saved(tmp_path, kind, stager):
    if stager not in (found := stagers(tmp_path)):
        pytest.skip("this torch has no DefaultStager")
    made, expected = state(), state()
    if stager in ("default", "later"):
        del made["sparse"], expected["sparse"]  # DefaultStager does not support it
    options = {"checkpoint_id": tmp_path, "async_checkpointer_type": kind, **found[stager]}
    opened = threading.Timer(0.05, (gate := Gate()).open)
    dcp.async_save({"n": 0}, checkpoint_id=tmp_path / "before", async_stager=gate)
    opened.start()
    returned = dcp.async_save(made, **options)
    if stager == "later":
        returned.staging_completion.result()
        assert isinstance(returned, AsyncSaveResponse)
        returned = returned.upload_completion
    made.setdefault("sparse", torch.eye(2).to_sparse())
    change(made)
    metadata = returned.result()
    loaded = blank(expected)
    dcp.load(loaded, checkpoint_id=tmp_path)
    assert isinstance(metadata, dcp.Metadata)
    assert metadata.__class__ is dcp.Metadata
    assert equal(dense(loaded), dense(expected))


def test_the_state_is_not_changed(tmp_path):
    made = state()
    made["p"] = torch.nn.Parameter(torch.ones(2))
    objects = {name: id(value) for name, value in made.items()}
    before = {n: (v.data_ptr(), v.stride()) for n, v in made.items() if n in ("w", "columns", "p")}
    dcp.async_save(made, checkpoint_id=tmp_path).result()
    assert {name: id(value) for name, value in made.items()} == objects
    assert {n: (made[n].data_ptr(), made[n].stride()) for n in before} == before
    assert made["p"].requires_grad


@pytest.mark.parametrize("kind", TYPES)
def test_tied_tensors_stay_tied(tmp_path, kind):
    w = torch.ones(1000)
    made = {"w": w, "tied": w, "view": w.view(1000)}
    dcp.async_save(made, checkpoint_id=tmp_path, async_checkpointer_type=kind).result()
    (file,) = tmp_path.glob("*.distcp")
    assert file.stat().st_size < 8000


def test_objects_with_tensors_inside_are_copied_too(tmp_path):
    box = Box(3)
    with held(tmp_path / "before"):
        done = dcp.async_save({"box": box}, checkpoint_id=tmp_path)
        box.number, _ = 4, box.tensor.zero_()
    done.result()
    data = torch.load(next(tmp_path.glob("*.distcp")), weights_only=False)
    assert (data.number, data.tensor.tolist()) == (3, [3.0, 3.0])


class Counter:
    """A user's object with a state of its own."""

    def __init__(self) -> None:
        self.count, self.thread = [5], None

    def state_dict(self) -> dict:
        self.thread = threading.current_thread()
        return {"count": self.count}

    def load_state_dict(self, state: dict) -> None: ...


def test_state_dicts_are_called_on_the_callers_thread(tmp_path):
    counter = Counter()
    with held(tmp_path / "before"):
        done = dcp.async_save({"counter": counter}, checkpoint_id=tmp_path)
        assert counter.thread is threading.main_thread()
        counter.count[0] = 6
    done.result()
    assert sk.open(tmp_path).read("counter.count") == [5]


class Stager(staging.BlockingAsyncStager):
    """A stager of a user's own class, which records its calls."""

    def __init__(self, synchronize: bool) -> None:
        super().__init__()
        self.calls, self._synchronize_after_execute = [], synchronize

    def stage(self, state):
        self.calls.append("stage")
        return {**super().stage(state), "staged": True}

    def synchronize_staging(self):
        self.calls.append("synchronize")


class StagingWriter(Stager, dcp.FileSystemWriter):
    """A writer that also stages."""

    def __init__(self, path) -> None:
        dcp.FileSystemWriter.__init__(self, path)
        self.calls = []


def test_a_stager_of_the_users_own_is_called_as_documented(tmp_path):
    for wanted in (True, False):
        stager = Stager(wanted)
        dcp.async_save({"n": 1}, checkpoint_id=tmp_path, async_stager=stager).result()
        assert stager.calls == ["stage", "synchronize"][: 1 + wanted]
        assert sk.open(tmp_path).read("staged") is True
    writer = StagingWriter(tmp_path)
    dcp.async_save({"n": 2}, storage_writer=writer).result()
    assert writer.calls[0] == "stage"
    assert sk.open(tmp_path).read("n") == 2
    writer.calls.clear()
    dcp.async_save({"n": 3}, storage_writer=writer, async_stager=Stager(False)).result()
    assert writer.calls == []


def test_an_asynchronous_stager_gives_two_futures(tmp_path):
    gate = Gate()
    response = dcp.async_save({"n": [1]}, checkpoint_id=tmp_path, async_stager=gate)
    assert type(response) is getattr(
        theirs := stock.state_dict_saver, "AsyncSaveResponse", AsyncSaveResponse
    ), theirs
    assert not response.staging_completion.done()
    assert not response.upload_completion.done()
    gate.open()
    assert response.staging_completion.result(60) is None
    assert response.upload_completion.result(60).__class__ is dcp.Metadata


def test_an_error_of_asynchronous_staging_is_raised_by_both_futures(tmp_path):
    gate = Gate()
    response = dcp.async_save({"n": [1]}, checkpoint_id=tmp_path, async_stager=gate)
    gate.staged[0][0].set_exception(ValueError("no room"))
    with pytest.raises(ValueError, match=r"^no room$"):
        response.staging_completion.result(60)
    with pytest.raises(ValueError, match="no room") as caught:
        response.upload_completion.result(60)
    assert isinstance(caught.value, CheckpointException)
    assert not list(tmp_path.iterdir())


def test_an_error_of_staging_is_raised_at_once_and_later_saves_work(tmp_path):
    with pytest.raises(LookupError, match="no room") as caught:
        dcp.async_save({"n": 1}, checkpoint_id=tmp_path, async_stager=dcp_async.FailingStager())
    assert not isinstance(caught.value, CheckpointException)
    dcp.async_save({"n": 2}, checkpoint_id=tmp_path).result()
    assert sk.open(tmp_path).read("n") == 2


def test_saves_to_one_path_keep_their_order(tmp_path):
    with held(tmp_path / "before"):
        done = [
            dcp.async_save({"n": n}, checkpoint_id=tmp_path, async_checkpointer_type=kind)
            for n, kind in enumerate(TYPES * 2)
        ]
        assert not any(one.cancel() or one.done() for one in done)
    done[3].add_done_callback(lambda _: done.append([one.done() for one in done]))
    dcp.save({"n": "last"}, checkpoint_id=tmp_path)  # after all of them
    assert done[4] == [True] * 4
    assert sk.open(tmp_path).read("n") == "last"
    assert sk.open(tmp_path).verify().ok


def test_memory_that_a_stager_keeps_is_not_overwritten_too_early(tmp_path):
    writer = dcp.FileSystemWriter(tmp_path, cache_staged_state_dict=True)
    found = [{"storage_writer": writer}]
    if hasattr(stock_staging, "DefaultStager"):
        options = stock_staging.StagingOptions(False, False, False, False)
        found.append({"async_stager": stock_staging.DefaultStager(options)})
    for number, given in enumerate(found):
        w, gate, path = torch.ones(4), Gate(), f"{tmp_path}/{number}"
        dcp.async_save({"n": 0}, checkpoint_id=f"{path}/before", async_stager=gate)
        first = dcp.async_save({"w": w}, checkpoint_id=f"{path}/first", **given)
        w.fill_(2)
        threading.Timer(0.05, gate.open).start()
        second = dcp.async_save({"w": w}, checkpoint_id=f"{path}/second", **given)
        assert first.done()
        w.fill_(3)
        second.result()
        assert sk.open(f"{path}/first").read("w").tolist() == [1] * 4
        assert sk.open(f"{path}/second").read("w").tolist() == [2] * 4


@pytest.mark.parametrize("kind", TYPES)
def test_errors_are_those_of_save_and_are_logged(tmp_path, caplog, kind):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, logger="shardkeep"):
        done = dcp.async_save(
            {"n": 1}, checkpoint_id=tmp_path / "file" / "x", async_checkpointer_type=kind
        )
        with pytest.raises(NotADirectoryError) as caught:
            done.result(60)
    assert isinstance(caught.value, CheckpointException)
    assert list(caught.value.failures) == [0]
    assert caught.value.filename.startswith(str(tmp_path / "file"))
    (line,) = [record.getMessage() for record in caplog.records if "shardkeep" in record.name]
    by = "the save of .* failed on rank 0" if kind == TYPES[0] else "An asynchronous save failed"
    assert re.match(rf"{by}: NotADirectoryError: \[Errno 20\]", line)
    with pytest.raises(RuntimeError, match="give `checkpoint_id`, or a `storage_writer`"):
        dcp.async_save({"n": 1}, async_checkpointer_type=kind).result(60)


@pytest.mark.parametrize("kind", TYPES)
def test_values_that_cannot_be_pickled_are_refused_by_name(tmp_path, kind):
    done = dcp.async_save(
        {"fine": 1, "group": {"bad": lambda: 1}},
        checkpoint_id=tmp_path,
        async_checkpointer_type=kind,
    )
    with pytest.raises(
        sk.Conflict, match=r"object 'group\.bad' cannot be pickled: .*lambda"
    ) as caught:
        done.result(60)
    assert isinstance(caught.value, CheckpointException)
    assert not list(tmp_path.glob(".metadata"))


def quiet() -> tuple[list[str], int]:
    """Return the threads and descriptors of this process, once those that end have ended.

    The thread that saves stays, and the thread that renews leases stays for a while.
    """
    end = time.monotonic() + PROMPT_SECONDS
    while time.monotonic() < end:
        names = [one.name for one in threading.enumerate()]
        names = [name for name in names if name not in ("shardkeep-save", "shardkeep-lease")]
        if not any(name.startswith("shardkeep") for name in names):
            break
        time.sleep(0.01)
    return names, len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_two_hundred_saves_leave_nothing_behind(tmp_path):
    made = {"w": torch.ones(10), "n": [1]}
    for kind in TYPES:
        dcp.async_save(made, checkpoint_id=tmp_path, async_checkpointer_type=kind).result()
    before = quiet()
    for _ in range(10):
        done = [
            dcp.async_save(made, checkpoint_id=tmp_path, async_checkpointer_type=kind)
            for kind in [TYPES[0]] * 15 + TYPES[1:] * 5
        ]
        for one in done:
            one.result()
    threads, files = quiet()
    assert threads == before[0]
    assert files <= before[1]  # A file that an earlier test left open may be closed meanwhile.
    assert len(list(tmp_path.iterdir())) == 3


LEAVE = """
import os, sys, time, torch
import shardkeep.dcp as dcp
from shardkeep.dcp.operations import background_process
from shardkeep.dcp.state_dict_saver import AsyncCheckpointerType

if __name__ == "__main__":
    made = {"w": torch.ones(20_000_000)}
    process = AsyncCheckpointerType.PROCESS
    dcp.async_save(made, checkpoint_id=sys.argv[1] + "/a")
    done = dcp.async_save(made, checkpoint_id=sys.argv[1] + "/b", async_checkpointer_type=process)
    if sys.argv[2] == "killed":
        done.result()
        print(background_process._processes[0]._process.pid, flush=True)
        os.kill(os.getpid(), 9)
    dcp.async_save(made, checkpoint_id=sys.argv[1] + "/c")
    print("end", flush=True)
"""


@pytest.mark.parametrize("how", ["ends", "killed"])
def test_a_program_that_ends_loses_no_save_and_leaves_no_process(tmp_path, how):
    script = tmp_path / "leave.py"
    script.write_text(LEAVE)
    ran = subprocess.run(
        [sys.executable, script, tmp_path, how],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    if how == "ends":
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "end\n", "")
        for name in "abc":
            assert sk.open(tmp_path / name).read("w").sum() == 20_000_000
        return
    pid, end = int(ran.stdout), time.monotonic() + PROMPT_SECONDS
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_a_process_group_without_cpu_backend_suffices(tmp_path):
    dist.init_process_group("cuda:gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert torch.device("cpu") not in dist.group.WORLD._device_types
        dcp.async_save({"n": 1}, checkpoint_id=tmp_path).result()
    finally:
        dist.destroy_process_group()
    assert sk.open(tmp_path).read("n") == 1


def test_names_are_those_of_torch():
    assert staging is stock_staging
    for name in ("AsyncCheckpointerType", "AsyncSaveResponse"):
        theirs = getattr(stock.state_dict_saver, name, None)
        assert theirs in (None, getattr(state_dict_saver, name))
    assert issubclass(type(Future()), Future)


@pytest.mark.gloo
def test_saves_run_beside_collectives_of_the_training(gloo, tmp_path):
    ran = gloo.run(dcp_async.everything, str(tmp_path), env=dcp_async.ENV)
    assert ran == ["fine"] * 4


@pytest.mark.gloo
def test_failures_of_ranks_are_raised_on_all(gloo, tmp_path):
    told = gloo.run(dcp_async.failures, str(tmp_path), env=dcp_async.ENV)
    for rank, (thread, wrote, process, wrote_too, died, same) in enumerate(told):
        for one in (thread, process):
            if rank == 1:
                assert one == "here: no room"
            else:
                assert one.startswith("RankFailed: ")
                assert "rank 1" in one
                assert one.endswith("the state was not staged: LookupError: no room")
        for one in (wrote, wrote_too):
            assert one == "FileExistsError: FileExistsError: [Errno 17] told so: 'a file'"
        if rank == 3:
            assert died.endswith("the process that saves in the background ended: exit code -9")
        else:
            assert "rank 3" in died
        assert same == f"same process: {rank != 3}"


@pytest.mark.gloo
def test_a_save_completes_after_its_group_was_destroyed(gloo, tmp_path):
    assert gloo.run(dcp_async.group_ends_first, str(tmp_path)) == ["fine"] * 4
    assert {"r0", "r1", "r2", "r3", "all"} == set(sk.open(tmp_path))
