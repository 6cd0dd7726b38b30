"""Tiny training jobs in every layout that torch has, for runs on real ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import shardkeep as sk
from support.scenarios import bits


class Net(nn.Module):
    """A model with tied embeddings, a tiny parameter, buffers of other dtypes, and odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)
        self.norm = nn.LayerNorm(6)
        self.gain = nn.Parameter(torch.rand(1))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.randint(99, (), dtype=torch.int64))
        self.register_buffer("mean", torch.rand(3).bfloat16())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return self.head(self.norm(x + self.down(self.up(x).relu())) * self.gain)


def plain(model: nn.Module) -> nn.Module:
    return model


def fsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def tensor_parallel(model: nn.Module, mesh: Any = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    return model


def fsdp_tensor_parallel(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tensor_parallel(model, mesh["tp"])
    fully_shard(model.up, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return model


def hsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


LAYOUTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": plain,
    "fsdp": fsdp,
    "tp": tensor_parallel,
    "fsdp_tp": fsdp_tensor_parallel,
    "hsdp": hsdp,
    "ddp": ddp,
}


def job(layout: str, seed: int, steps: int) -> tuple[dict[str, Any], nn.Module, Any]:
    """Return the state of a job after some steps, its model and its optimizer."""
    torch.manual_seed(seed)
    model = LAYOUTS[layout](Net())
    optim = torch.optim.AdamW(model.parameters(), lr=0.01 * seed, foreach=False)
    for _ in range(steps):
        model(torch.randint(11, (2, 5))).square().mean().backward()
        optim.step()
        optim.zero_grad()
    weights, moments = get_state_dict(model, optim)
    return {"model": weights, "optim": moments, "step": seed * 100, "seed": [seed]}, model, optim


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Return gathered values by flat names; a tensor as its dtype, shape and bytes."""
    if isinstance(value, torch.Tensor):
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return {name: (str(whole.dtype), tuple(whole.shape), bits(whole))}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        items = enumerate(value)
    else:
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in items:
        found |= leaves(inner, f"{name}.{key}" if name else str(key))
    return found


def save(rank: int, size: int, path: str, layout: str) -> dict[str, Any]:
    """Train two steps and save; return the gathered state, and the byte counts of the report."""
    state, _, _ = job(layout, 3, 2)
    report = sk.save(state, path)
    whole = leaves(state)
    return {"leaves": whole, "written": report.written, "nbytes": report.nbytes}


def load(rank: int, size: int, path: str, layout: str, with_stock: bool) -> dict[str, Any]:
    """Load into a fresh job with other values, by Shardkeep and by stock torch."""
    state, model, _ = job(layout, 5, 0)
    report = sk.load(state, path)
    result = {"ours": leaves(state), "unexpected": report.unexpected, "missing": report.missing}
    inner = model.module if layout == "ddp" else model
    result["in place"] = leaves(inner.state_dict(), "model")
    if with_stock:
        other, _, _ = job(layout, 7, 0)
        stock.load(other, checkpoint_id=path)
        result["stock"] = leaves(other)
    return result


# --- objects that hold optimizers and modules themselves -----------------------------------------


def resume(rank: int, size: int, path: str) -> list[str]:
    """Save a model and its optimizer as objects; load into new ones that never made a step."""
    _, model, optim = job("fsdp", 3, 2)
    sk.save({"model": model, "optim": optim}, f"{path}/ours")
    stock.save({"model": model, "optim": optim}, checkpoint_id=f"{path}/stock")
    for name in ("ours", "stock"):
        torch.manual_seed(5)
        other = fsdp(Net())
        later = torch.optim.AdamW(other.parameters(), lr=9.0, foreach=False)
        before = leaves(other.state_dict())
        refused = {"model": other, "optim": later, "absent": 1}
        try:
            sk.load(refused, f"{path}/{name}")
        except sk.Mismatch:
            assert not later.state
            assert leaves(other.state_dict()) == before
        else:
            raise AssertionError("a missing name was not refused")
        report = sk.load({"model": other, "optim": later}, f"{path}/{name}")
        assert report.unexpected == ()
        assert leaves(other.state_dict()) == leaves(model.state_dict())
        assert leaves(later.state_dict()) == leaves(optim.state_dict())
        for a, b in zip(optim.state.values(), later.state.values(), strict=True):
            assert {key: type(one) for key, one in a.items()} == {
                key: type(one) for key, one in b.items()
            }
        for one, net in ((optim, model), (later, other)):
            torch.manual_seed(1)
            net(torch.randint(11, (2, 5))).square().mean().backward()
            one.step()
            one.zero_grad()
        assert leaves(other.state_dict()) == leaves(model.state_dict())
        _, model, optim = job("fsdp", 3, 2)
    return list(report.loaded)


# --- failures ------------------------------------------------------------------------------------


def failing_save(rank: int, size: int, path: str, how: str, overwrite: bool) -> dict[str, Any]:
    """Save while one rank fails in a given way; return this rank's result and the time it took."""
    from torch.distributed.tensor import Partial, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    fine = distribute_tensor(torch.ones(size * 2, 3), mesh, [Shard(0)])
    state: dict[str, Any] = {"w": fine, "mine": {rank: torch.full((4,), float(rank))}}
    store: Any = path
    if rank == 2 and how == "partial":
        state["p"] = DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)
    if rank == 2 and how in ("full", "killed"):
        store = Broken(path, how)
    began = time.monotonic()
    try:
        sk.save(state, store, overwrite=overwrite)
    except sk.RankFailed as error:
        known = {"rank": error.rank, "phase": error.phase, "path": error.path}
        end = {"kind": "RankFailed", "text": str(error), **known}
    except Exception as error:
        end = {"kind": type(error).__name__, "text": str(error)}
    else:
        end = {"kind": "saved"}
    return {**end, "took": time.monotonic() - began}


def async_saves(rank: int, size: int, path: str) -> dict[str, Any]:
    """Save twice in the background while all ranks run collectives of their own."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    sharded = distribute_tensor(torch.ones(size * 2, 3), mesh, [Shard(0)])
    mine = torch.full((4,), float(rank))
    state = {"w": sharded, "mine": {rank: mine}}
    handles = []
    for _ in range(2):
        handles.append(sk.async_save(state, path, overwrite=True))
        for _ in range(20):
            dist.all_reduce(torch.ones(10))
    mine.zero_()
    report = handles[-1].result(60)
    return {"phases": list(report.seconds), "slowest": report.slowest}


def failing_async_save(rank: int, size: int, path: str) -> dict[str, Any]:
    """Save in the background while rank 2 can't write; return each rank's error, and its origin."""
    state = {"mine": {rank: torch.full((4,), float(rank))}}
    at = "call"
    try:
        handle = sk.async_save(state, Broken(path, "full") if rank == 2 else path)
        at = "result"
        handle.result(60)
    except sk.RankFailed as error:
        return {"kind": "RankFailed", "at": at, "rank": error.rank, "phase": error.phase}
    except OSError as error:
        return {"kind": type(error).__name__, "at": at, "text": str(error)}
    return {"kind": "saved", "at": at}


def Broken(path: str, how: str) -> Any:
    """Return a local store whose files can't be written."""
    import errno
    import os
    import signal

    from shardkeep.stores import LocalStore

    class Target:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __enter__(self) -> Any:
            self.inner.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.inner.__exit__(*error)

        def write_at(self, offset: int, parts: Sequence[memoryview]) -> None:
            self.inner.write_at(offset, [parts[0][:4096]])
            if how == "killed":
                time.sleep(1)  # the others know the phase from its last heartbeat
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device")

    class Store(LocalStore):
        def open_positioned_writer(self, name: str, nbytes: int) -> Any:
            return Target(super().open_positioned_writer(name, nbytes))

    return Store(path)


def read_back(rank: int, size: int, path: str) -> dict[str, Any]:
    """Return the content of the checkpoint, read on this number of ranks."""
    state = {"w": torch.zeros(8, 3), "mine": {r: torch.zeros(4) for r in range(4)}}
    sk.load(state, path)
    return leaves(state)


def folder(path: str | Path) -> set[str]:
    return {file.name for file in Path(path).iterdir()}


def leaves_of_tree(checkpoint: Any) -> dict[str, Any]:
    """Return the leaves of the nested state, reading each tensor by the name at its place."""
    found = {}
    for name, leaf in leaves(checkpoint.tree()).items():
        found[name] = leaf
        if isinstance(leaf, sk.TensorInfo):
            data = checkpoint.read(leaf.name).tobytes()
            found[name] = (f"torch.{leaf.dtype}", leaf.shape, data)
    return found
