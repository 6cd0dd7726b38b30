"""Scenarios of `async_save` on real ranks, in threads and in processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import shardkeep as sk
import shardkeep.dcp as dcp
from shardkeep.dcp.operations import background_process
from shardkeep.dcp.state_dict_saver import AsyncCheckpointerType
from support.layouts import Pair, _sharded_tensor
from support.scenarios import same, values
from support.waiting import PROMPT_SECONDS

TYPES = {"thread": AsyncCheckpointerType.THREAD, "process": AsyncCheckpointerType.PROCESS}
ENV = {"SHARDKEEP_HEARTBEAT_SECONDS": "0.2", "SHARDKEEP_DEADLINE_SECONDS": "40"}


class Gate:
    """A stager that finishes staging only when `open` is called, so nothing is saved before."""

    def __init__(self) -> None:
        self.staged: list[tuple[Future[Any], Any]] = []

    should_synchronize_after_execute = False

    def stage(self, state: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.staged.append((future, state))
        return future

    def open(self) -> None:
        for future, state in self.staged:
            future.set_result(state)
        self.staged = []

    def close(self) -> None: ...

    def synchronize_staging(self) -> None: ...


@contextmanager
def held(path: Any, **options: Any) -> Iterator[None]:
    """Hold back the asynchronous saves of the block until its end."""
    gate = Gate()
    response = dcp.async_save({"n": 0}, checkpoint_id=path, async_stager=gate, **options)
    try:
        yield
    finally:
        gate.open()
        response.upload_completion.result()


class OwnPlanner(dcp.DefaultSavePlanner):
    """A planner that is sent by pickle, and that checks its rank and its process."""

    def __init__(self, wanted: tuple[int, int]) -> None:
        super().__init__()
        self.wanted = wanted

    def create_local_plan(self) -> Any:
        assert (dist.get_rank(), dist.get_world_size()) == self.wanted
        assert multiprocessing.current_process().name == "shardkeep-save"
        dist.barrier()
        return super().create_local_plan()


class OwnWriter(stock.FileSystemWriter):
    """A writer that dies or raises an error while writing, on the rank given by `fate`."""

    fate: tuple[int, str] = (-1, "")

    def write_data(self, plan: Any, planner: Any) -> Any:
        rank, how = self.fate
        if dist.get_rank() == rank:
            if how == "raise":
                raise FileExistsError(17, "told so", "a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write_data(plan, planner)


class FailingStager(stock.staging.BlockingAsyncStager):
    def stage(self, state: Any) -> Any:
        raise LookupError("no room")


@contextmanager
def may_have_children() -> Iterator[None]:
    """Allow this process to start children.

    The processes of the pool are daemons, which Python does not allow to have children. Ranks of a
    real job have no such limit.
    """
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    before = config.pop("daemon", None)
    try:
        yield
    finally:
        config["daemon"] = before


def everything(rank: int, size: int, path: str) -> str:
    """Save all kinds of tensors and change them right after the call, during collectives."""
    with may_have_children():
        for name, kind in TYPES.items():
            _everything(rank, size, f"{path}/{name}", kind)
            _parts(rank, f"{path}/{name}", kind)
    return "fine"


def _everything(rank: int, size: int, path: str, kind: Any) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    whole, scalar = values("w", (7, 5), torch.float32), torch.tensor(3.0)
    data, scale = values("d", (4, 3), torch.int8), values("s", (4, 1), torch.bfloat16)
    placed = torch.full((3, 2), float(rank))
    place = {"global_shape": (8, 2), "global_offsets": ((rank * 2, 0),)}
    vars(placed).update(place, local_offsets=((1, 0),), local_sizes=((2, 2),))

    def state(fill: bool) -> dict[str, Any]:
        w = distribute_tensor(whole.clone(), mesh, [Shard(0), Shard(1)])
        made = {
            "w": w,
            "tied": w,
            "scalar": distribute_tensor(scalar.clone(), mesh, [Replicate(), Replicate()]),
            "sharded": _sharded_tensor(rank, size, values("sharded", (11, 3), torch.float32), fill),
            "pair": Pair(data.clone(), scale.clone()),
            "plain": [torch.nn.Parameter(scale.clone()), {"lr": [0.1]}],
            "mine": {str(rank): {"rng": torch.full((3,), rank), "seen": [rank]}},
        }
        if not fill:
            _wipe(made)
        return made

    saved = state(True)
    saved["placed"] = placed
    done = [dcp.async_save(saved, checkpoint_id=f"{path}/a", async_checkpointer_type=kind)]
    saved["plain"][1]["lr"][0] = 0.2
    done += [dcp.async_save(saved, checkpoint_id=f"{path}/a", async_checkpointer_type=kind)]
    _wipe(saved)
    saved["plain"][1]["lr"][0] = 0.3
    turns = 0
    while turns < 5 or not _all(all(one.done() for one in done)):
        turns += 1
        dist.all_reduce(torch.ones(100_000))
    assert isinstance(done[0].result(), dcp.Metadata)
    assert set(done[1].result().state_dict_metadata) == set(sk.open(f"{path}/a"))
    assert same(saved["w"].to_local(), torch.zeros_like(saved["w"].to_local()))
    for reader in (dcp, stock):
        loaded = {**state(False), "placed": torch.zeros(8, 2)}
        pair = loaded.pop("pair")
        loaded.update({"pair.data8": pair.data8, "pair.scale": pair.scale})
        reader.load(loaded, checkpoint_id=f"{path}/a")
        assert same(loaded["w"].full_tensor(), whole)
        assert same(loaded["tied"].full_tensor(), whole)
        assert same(loaded["scalar"].full_tensor(), scalar)
        assert same(loaded["pair.data8"], data)
        assert same(loaded["pair.scale"], scale)
        assert same(loaded["plain"][0].data, scale)
        assert loaded["plain"][1] == {"lr": [0.2]}
        assert loaded["mine"][str(rank)]["rng"].tolist() == [rank] * 3
        assert loaded["mine"][str(rank)]["seen"] == [rank]
        assert loaded["placed"][:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        for shard in loaded["sharded"].local_shards():
            start, count = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
            rows = values("sharded", (11, 3), torch.float32)[start : start + count]
            assert same(shard.tensor, rows)
        dist.barrier()


def _wipe(value: Any) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            _wipe(inner)
    elif isinstance(value, Pair):
        _wipe([value.data8, value.scale])
    elif hasattr(value, "local_shards"):
        _wipe([shard.tensor for shard in value.local_shards()])
    elif isinstance(value, DTensor):
        _wipe(value.to_local())
    elif isinstance(value, torch.Tensor):
        value.detach().zero_()


def _all(mine: bool) -> bool:
    told = torch.tensor([int(mine)])
    dist.all_reduce(told, dist.ReduceOp.MIN)
    return bool(told.item())


def _parts(rank: int, path: str, kind: Any) -> None:
    """Save by some of the ranks, and by each rank alone."""
    options = {"async_checkpointer_type": kind}
    group = dist.new_group([3, 1])
    alone = dcp.async_save(
        {"r": rank, "t": torch.ones(2)}, checkpoint_id=f"{path}/alone{rank}", no_dist=True,
        **options,
    )  # fmt: skip
    if rank in (1, 3):
        half = sk.Shards((4,), [((rank - 1,), torch.full((2,), rank))])
        state = {"mine": {rank: torch.tensor([rank])}, "w": half}
        dcp.async_save(
            state, checkpoint_id=f"{path}/group", process_group=group, **options
        ).result()
    dist.barrier()
    assert isinstance(alone.result(), dcp.Metadata)
    found = sk.open(f"{path}/group")
    assert [found.read(f"mine.{r}").tolist() for r in (1, 3)] == [[1], [3]]
    assert found.read("w").tolist() == [1, 1, 3, 3]
    assert sk.open(f"{path}/alone{rank}").read("r") == rank


def failures(rank: int, size: int, path: str) -> list[str]:
    """Return the errors of failed saves on this rank, the last of a process that was killed."""
    with may_have_children():
        told = []
        for name, kind in TYPES.items():
            options = {"checkpoint_id": f"{path}/{name}", "async_checkpointer_type": kind}
            told += [_staging(rank, options), _writing(rank, options)]
        return told + _death(rank, size, f"{path}/death")


def _tell(future: Any) -> str:
    error = future.exception()
    assert isinstance(error, CheckpointException)
    assert isinstance(error, Exception)
    last = str(error).strip().splitlines()[-1]
    return f"{type(error).__name__}: {last}"


def _staging(rank: int, options: dict[str, Any]) -> str:
    """Save with a stager that fails on rank 1; return the error of this rank."""
    began = time.monotonic()
    told = "it did not raise"
    try:
        stager = FailingStager() if rank == 1 else None
        future = dcp.async_save({"n": rank}, async_stager=stager, **options)
    except LookupError as error:
        told = f"here: {error}"
    else:
        told = _tell(future)
    assert time.monotonic() - began < PROMPT_SECONDS
    dcp.async_save({"n": 5}, **options).result()
    dist.barrier()
    assert sk.open(options["checkpoint_id"]).read("n") == 5
    return told


def _writing(rank: int, options: dict[str, Any]) -> str:
    """Save with a writer that fails on rank 2, and check that the saving process stays alive."""
    writer = OwnWriter(options["checkpoint_id"])
    writer.fate = (2, "raise")
    options = {**options, "checkpoint_id": None, "storage_writer": writer}
    future = dcp.async_save({"t": torch.ones(size := 4) * rank, "n": size}, **options)
    before = [one._process.pid for one in background_process._processes]
    told = _tell(future)
    assert isinstance(future.exception(), FileExistsError)
    assert future.exception().filename == "a file"
    writer.fate = (-1, "")
    dcp.async_save({"n": 6}, **options).result()
    assert [one._process.pid for one in background_process._processes][: len(before)] == before
    dist.barrier()
    return told


def _death(rank: int, size: int, path: str) -> list[str]:
    """Save while rank 3's saving process is killed; check that later saves work."""
    options = {"async_checkpointer_type": TYPES["process"]}
    own = OwnPlanner((rank, size))
    dcp.async_save({"n": 1}, checkpoint_id=f"{path}/first", planner=own, **options).result()
    before = background_process._processes[0]._process.pid
    writer = OwnWriter(f"{path}/second")
    writer.fate = (3, "die")
    began = time.monotonic()
    told = _tell(dcp.async_save({"n": 2}, storage_writer=writer, **options))
    assert time.monotonic() - began < PROMPT_SECONDS
    for name, planner in (("third", own), ("fourth", None)):
        put = dcp.async_save({"n": 3}, checkpoint_id=f"{path}/{name}", planner=planner, **options)
        put.result()
        dist.barrier()
        assert sk.open(f"{path}/{name}").read("n") == 3
    same_process = background_process._processes[0]._process.pid == before
    return [told, f"same process: {same_process}"]


def group_ends_first(rank: int, size: int, path: str) -> str:
    """Destroy the process group and its store before the save begins; all ranks still take part."""
    _own_group(rank, size)
    gate = Gate()
    done = dcp.async_save({"all": rank, f"r{rank}": 1}, checkpoint_id=path, async_stager=gate)
    dist.barrier()
    dist.destroy_process_group()
    gate.open()
    done.upload_completion.result()
    return "fine"


def _own_group(rank: int, size: int) -> None:
    """Replace the default group by one whose store is used by no other group."""
    port: list[Any] = [None]
    store = None
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = [store.port]
    dist.broadcast_object_list(port)
    dist.barrier()
    dist.destroy_process_group()
    store = store or dist.TCPStore("127.0.0.1", port[0], is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
