"""Training code as users write it, importing `torch.distributed.checkpoint`; see `in_place`.

Each example trains, saves, resumes in a fresh model, and compares every bit of the model, of the
optimizer and of the next step. They run on gloo ranks: `example(rank, size, path)`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import (
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel as DDP

from support.in_place import in_place_of_torchs


def example(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the example with Shardkeep in torch's place, checked to be used."""

    @wraps(function)
    def run(rank: int, size: int, path: str, *args: Any) -> str:
        with in_place_of_torchs():
            import torch.distributed.checkpoint as dcp

            assert dcp.__name__ == "shardkeep.dcp"
            function(rank, size, path, *args)
        dist.barrier()
        return "done"

    return run


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight  # tied, as in most language models

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.head(self.down(torch.relu(self.up(self.embed(tokens)))))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(torch.relu(self.up(x)))


def made(kind: type[nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return kind()


def tokens() -> torch.Tensor:
    return torch.arange(24).reshape(4, 6) % 12


def features() -> torch.Tensor:
    return torch.linspace(-1, 1, 32).reshape(4, 8)


def step(model: nn.Module, optim: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    optim.zero_grad()
    model(batch).square().mean().backward()
    optim.step()


def plain(value: Any) -> Any:
    """Return a state with all its tensors gathered, on every rank."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, DTensor):
        return value.full_tensor()
    if hasattr(value, "local_shards"):
        return [shard.tensor.clone() for shard in value.local_shards()]
    return value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def same(one: Any, other: Any) -> None:
    """Check that two plain states are equal in every bit."""
    assert type(one) is type(other), (one, other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            same(left, right)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


def resume(path: str, make: Callable[[int], tuple[Any, Any]], batch: torch.Tensor) -> None:
    """Train, save, load into a fresh model by `get_state_dict` and `set_state_dict`, train on."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optim = make(1)
    step(model, optim, batch)
    step(model, optim, batch)
    weights, moments = get_state_dict(model, optim)
    dcp.save({"model": weights, "optim": moments}, checkpoint_id=path)
    saved = plain({"model": weights, "optim": moments})

    other, other_optim = make(2)
    weights, moments = get_state_dict(other, other_optim)
    dcp.load({"model": weights, "optim": moments}, checkpoint_id=path)
    set_state_dict(other, other_optim, model_state_dict=weights, optim_state_dict=moments)
    weights, moments = get_state_dict(other, other_optim)
    same(plain({"model": weights, "optim": moments}), saved)
    step(model, optim, batch)
    step(other, other_optim, batch)
    same(plain(get_state_dict(other, other_optim)[0]), plain(get_state_dict(model, optim)[0]))


@example
def ddp(rank: int, size: int, path: str) -> None:
    def make(seed: int) -> tuple[Any, Any]:
        model = DDP(made(Net, seed))
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    resume(path, make, tokens())


@example
def fsdp1(rank: int, size: int, path: str) -> None:
    def make(seed: int) -> tuple[Any, Any]:
        model = FSDP(made(Mlp, seed), device_id=torch.device("cpu"), use_orig_params=True)
        FSDP.set_state_dict_type(
            model,
            StateDictType.SHARDED_STATE_DICT,
            ShardedStateDictConfig(),
            ShardedOptimStateDictConfig(),
        )
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    resume(path, make, features())


@example
def fsdp2(rank: int, size: int, path: str, shape: tuple[int, ...] = ()) -> None:
    def make(seed: int) -> tuple[Any, Any]:
        names = ("replicate", "shard")[-len(shape or (size,)) :]
        mesh = init_device_mesh("cpu", shape or (size,), mesh_dim_names=names)
        model = made(Mlp, seed)
        for part in (model.up, model.down, model):
            fully_shard(part, mesh=mesh)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    resume(path, make, features())


def _parallel(model: Any, mesh: Any) -> Any:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


@example
def tensor_parallel(rank: int, size: int, path: str) -> None:
    def make(seed: int) -> tuple[Any, Any]:
        model = _parallel(made(Mlp, seed), init_device_mesh("cpu", (size,)))
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)

    resume(path, make, features())


@example
def two_dimensions(rank: int, size: int, path: str) -> None:
    def make(seed: int) -> tuple[Any, Any]:
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
        model = _parallel(made(Mlp, seed), mesh["tp"])
        fully_shard(model, mesh=mesh["dp"])
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)

    resume(path, make, features())


@example
def another_layout(rank: int, size: int, path: str) -> None:
    """Save by FSDP2 on all ranks; load under tensor parallelism, and unsharded on each rank."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    model = made(Mlp, 1)
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    weights = get_model_state_dict(model)
    dcp.save({"model": weights}, checkpoint_id=path)
    saved = plain(weights)
    parallel = get_model_state_dict(_parallel(made(Mlp, 2), init_device_mesh("cpu", (size,))))
    dcp.load({"model": parallel}, checkpoint_id=path)
    same(plain(parallel), saved)
    alone = made(Mlp, 3).state_dict()
    dcp.load({"model": alone}, checkpoint_id=path, no_dist=True)
    same(plain(dict(alone)), saved)
