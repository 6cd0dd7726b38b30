"""Planners of a user's own, one process and on real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import StateDictType
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shardkeep as sk
import shardkeep.dcp as dcp
from shardkeep.dcp import format_utils
from shardkeep.dcp.default_planner import _EmptyStateDictLoadPlanner
from shardkeep.dcp.format_utils import BroadcastingTorchSaveReader, DynamicMetaLoadPlanner
from shardkeep.dcp.optimizer import load_sharded_optimizer_state_dict
from shardkeep.dcp.state_dict_loader import _load_state_dict_from_keys
from support.scenarios import equal, same, values


class SavePlanner(dcp.DefaultSavePlanner):
    """Somebody's own: so a save goes in steps."""

    def lookup_object(self, index: Any) -> Any:
        return super().lookup_object(index)


class LoadPlanner(dcp.DefaultLoadPlanner):
    """Somebody's own: so a load goes in steps."""

    def lookup_tensor(self, index: Any) -> Any:
        return super().lookup_tensor(index)


class Counting(SavePlanner):
    """Says how many items its local plans had: none, where an earlier plan is used again."""

    sent: list[int]

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        self.sent.append(len(plan.items))
        return plan


def share(rank: int, size: int, path: str) -> list[int]:
    """Save tensors that all ranks hold, of different sizes; the bytes in each rank's files."""
    state = {f"w{n}": torch.full((1024 * n,), n, dtype=torch.float32) for n in range(1, 25)}
    state["one"] = torch.zeros(0)
    dcp.save(state, checkpoint_id=path, planner=SavePlanner())
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(loaded, checkpoint_id=path, planner=LoadPlanner())
    assert equal(loaded, state)
    dist.barrier()
    return [file.stat().st_size for file in Path(path).glob(f"__{rank}_*")]


def cached(rank: int, size: int, path: str) -> list[int]:
    """Save states that change in turn with one planner class that keeps its plans."""
    mesh = init_device_mesh("cpu", (size,))
    Counting.sent = []

    def state(step: int) -> dict[str, Any]:
        kind = torch.bfloat16 if step >= 3 else torch.float32
        whole = values(f"w{step}", (7, 3), kind)
        made = {"model": {"w": distribute_tensor(whole, mesh, [Shard(0)])}, "step": step}
        if step >= 5:
            made["model"]["late"] = values(f"late{step}", (2,), torch.int32)
        return made

    for step in range(7):
        planner = Counting(enable_plan_caching=True)
        dcp.save(state(step), checkpoint_id=f"{path}/{step % 2}", planner=planner)
        dist.barrier()
        loaded = state(7)
        if step < 3:
            whole = torch.zeros(7, 3)
            loaded["model"]["w"] = distribute_tensor(whole, mesh, [Shard(0)])
        if step < 5:
            del loaded["model"]["late"]
        dcp.load(loaded, checkpoint_id=f"{path}/{step % 2}", planner=LoadPlanner())
        expected = state(step)
        assert loaded["step"] == step
        for name, tensor in expected["model"].items():
            pair = [loaded["model"][name], tensor]
            if name == "w":
                pair = [one.full_tensor() for one in pair]
            assert same(*pair), (step, name)
        dist.barrier()
        if rank == 0:
            assert sk.open(f"{path}/{step % 2}").verify().ok
        dist.barrier()
    return Counting.sent


def other_group(rank: int, size: int, path: str) -> str:
    """Use plans that all ranks have kept on a part of them."""
    group = dist.new_group([0, 1])

    class Kept(SavePlanner):
        pass

    state = {"a": torch.ones(3), "b": torch.ones(5), "c": torch.ones(4)}
    dcp.save(state, checkpoint_id=f"{path}/all", planner=Kept(enable_plan_caching=True))
    if rank > 1:
        return ""
    planner = Kept(enable_plan_caching=True)
    try:
        dcp.save(state, checkpoint_id=f"{path}/two", planner=planner, process_group=group)
    except dcp.CheckpointException as error:
        assert isinstance(error, ValueError)
        return str(error)
    return "saved"


def without_template(rank: int, size: int, path: str) -> list[Any]:
    """Load all, or some keys, on every rank, by the engine and in steps."""
    mesh = init_device_mesh("cpu", (size,))
    whole = values("w", (5, 3), torch.float32)
    state = {
        "model": {"w": distribute_tensor(whole, mesh, [Shard(0)]), "b": whole[0].clone()},
        "per": {0: {"x": torch.ones(2)}, 7: {"x": torch.zeros(2)}},
    }
    dcp.save(state, checkpoint_id=path)
    plain: dict[str, Any] = {}
    dcp.load(plain, checkpoint_id=path, planner=_EmptyStateDictLoadPlanner())
    assert same(plain["model"]["w"], whole)
    assert equal(plain["per"]["7"]["x"], torch.zeros(2))
    some = _load_state_dict_from_keys("model.b", checkpoint_id=path)
    assert equal(some, {"model": {"b": whole[0]}})
    every = _load_state_dict_from_keys(checkpoint_id=path)
    assert same(every["model"]["w"], whole)
    return list(every["per"])


def broadcast(rank: int, size: int, path: str) -> str:
    """Load a file that only rank 0 sees into tensors that are laid out over all ranks."""
    mesh = init_device_mesh("cpu", (size,))
    saved = {
        "model": {
            "rows": values("rows", (5, 3), torch.float32),
            "columns": values("columns", (3, 6), torch.bfloat16),
            "all": values("all", (4,), torch.bool),
            "scalar": torch.tensor(2.0),
        }
    }
    if rank == 0:
        torch.save(saved, f"{path}/file.pt")

    def blank(shapes: dict[str, Any]) -> dict[str, Any]:
        placed = {"rows": [Shard(0)], "columns": [Shard(1)]}
        return {
            "model": {
                name: distribute_tensor(torch.zeros_like(t), mesh, placed.get(name, [Replicate()]))
                if name != "scalar"
                else torch.zeros_like(t)
                for name, t in shapes.items()
            }
        }

    def load(state: dict[str, Any]) -> None:
        options = {"storage_reader": BroadcastingTorchSaveReader(),
                   "planner": DynamicMetaLoadPlanner()}  # fmt: skip
        with mock.patch.object(format_utils, "_read", format_utils._read if rank == 0 else _unseen):
            dcp.load(state, checkpoint_id=f"{path}/file.pt", **options)

    loaded = blank(saved["model"])
    load(loaded)
    for name, tensor in loaded["model"].items():
        full = tensor if name == "scalar" else tensor.full_tensor()
        assert same(full, saved["model"][name]), name
    told = []
    for name, shape in (("rows", (6, 3)), ("new", (2,))):
        try:
            load(blank({**saved["model"], name: torch.zeros(shape)}))
        except dcp.CheckpointException as error:
            (failure,) = error.failures.items()
            told.append(f"{failure[0]}: {failure[1][0]}")
    return "\n".join(told)


def _unseen(path: str) -> Any:
    raise FileNotFoundError(path)


def fsdp(rank: int, size: int, path: str) -> str:
    """An optimizer's state of FSDP1, saved on these ranks and loaded without a template."""

    def job(seed: int) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        layers = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.ReLU(), torch.nn.Linear(7, 1))
        model = FSDP(layers, device_id=torch.device("cpu"), use_orig_params=True)
        return model, torch.optim.Adam(model.parameters(), lr=0.01 * seed)

    def states(model: Any, optim: Any) -> dict[str, Any]:
        with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
            return {"model": model.state_dict(), "optim": FSDP.optim_state_dict(model, optim)}

    model, optim = job(1)
    for _ in range(3):
        model(torch.ones(2, 3) * (rank + 1)).sum().backward()
        optim.step()
        optim.zero_grad()
    saved = states(model, optim)
    dcp.save(saved, checkpoint_id=path)
    for reader, planner in (
        (dcp.FileSystemReader(path), None),
        (dcp.FileSystemReader(path), LoadPlanner()),
    ):
        other, other_optim = job(2)
        with FSDP.state_dict_type(other, StateDictType.SHARDED_STATE_DICT):
            found = load_sharded_optimizer_state_dict(other.state_dict(), "optim", reader, planner)
            assert list(found) == ["optim"]
            flat = FSDP.optim_state_dict_to_load(other, other_optim, found["optim"])
        other_optim.load_state_dict(flat)
        loaded = states(other, other_optim)["optim"]
        assert loaded["param_groups"] == saved["optim"]["param_groups"]
        for name, moments in saved["optim"]["state"].items():
            for key, wanted in moments.items():
                assert _local(loaded["state"][name][key]) == _local(wanted), (name, key)
    try:
        load_sharded_optimizer_state_dict({}, "nothing", dcp.FileSystemReader(path))
    except sk.Mismatch as error:
        return str(error)
    return "loaded"


def _local(value: Any) -> Any:
    shards = value.local_shards() if hasattr(value, "local_shards") else None
    if shards is None:
        return value.tolist()
    return [(shard.metadata.shard_offsets, shard.tensor.tolist()) for shard in shards]


def unlike(rank: int, size: int, path: str) -> list[Any]:
    """What each rank sees of failures that all have, and of different ones."""

    class Odd(SavePlanner):
        def create_local_plan(self) -> Any:
            raise (KeyError("w") if self.alike or rank else OSError(28, "full", "disk"))

    seen = []
    for alike in (True, False):
        planner = Odd()
        planner.alike = alike
        try:
            dcp.save({"n": 1}, checkpoint_id=path, planner=planner)
        except Exception as error:
            kinds = [isinstance(error, kind) for kind in (dcp.CheckpointException, KeyError)]
            causes = {r: repr(cause) for r, (cause, _) in error.failures.items()}
            seen.append((kinds, causes))
    return seen
