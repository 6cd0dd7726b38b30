"""How training frameworks call `torch.distributed.checkpoint`, in short.

They run on gloo ranks with Shardkeep in torch's place, as `dcp_examples` do.
"""

from __future__ import annotations

import random
from pathlib import Path
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

from support.dcp_examples import Mlp, example, features, made, plain, same, step


@example
def titan(rank: int, size: int, path: str) -> None:
    """Save model parts, optimizers, a loader and counters as Statefuls, in the background."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
    from torch.distributed.checkpoint.stateful import Stateful

    class Weights(Stateful):
        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def state_dict(self) -> dict[str, Any]:
            return get_model_state_dict(self.model)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            set_model_state_dict(
                self.model, model_state_dict=state_dict, options=StateDictOptions(strict=False)
            )

    class Optimizer(Stateful):
        options = StateDictOptions(flatten_optimizer_state_dict=True)

        def __init__(self, model: nn.Module, optim: torch.optim.Optimizer) -> None:
            self.model, self.optim = model, optim

        def state_dict(self) -> dict[str, Any]:
            return get_optimizer_state_dict(self.model, self.optim, options=self.options)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            set_optimizer_state_dict(
                self.model, self.optim, optim_state_dict=state_dict, options=self.options
            )

    class Loader(Stateful):
        """A data loader with a position for each rank, stored under a key of the rank."""

        def __init__(self, position: int) -> None:
            self.position = position

        def state_dict(self) -> dict[str, Any]:
            return {f"dp_rank_{rank}": {"position": self.position, "world": size}}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.position = state_dict[f"dp_rank_{rank}"]["position"]

    class Counters(Stateful):
        def __init__(self) -> None:
            self.step, self.losses = 0, []

        def state_dict(self) -> dict[str, Any]:
            return {"step": torch.tensor(self.step), "losses": self.losses}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.step, self.losses = int(state_dict["step"]), state_dict["losses"]

    def job(seed: int) -> tuple[dict[str, Any], Any, Any]:
        model = made(Mlp, seed)
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
        optim = torch.optim.AdamW(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optim, lambda n: 1 / (1 + n))
        states = {
            "model": Weights(model),
            "optimizer": Optimizer(model, optim),
            "lr_scheduler": schedule,
            "dataloader": Loader(seed * 100 + rank),
            "train_state": Counters(),
        }
        return states, model, optim

    states, model, optim = job(1)
    under_way = None
    for number in (1, 2):
        step(model, optim, features())
        states["lr_scheduler"].step()
        states["train_state"].step = number
        states["train_state"].losses.append(number / 2)
        if under_way is not None:
            under_way.result()
        expected = plain({**states["model"].state_dict(), **states["optimizer"].state_dict()})
        under_way = dcp.async_save(
            states,
            checkpoint_id=f"{path}/step-{number}",
            async_checkpointer_type=AsyncCheckpointerType.THREAD,
        )
    step(model, optim, features())  # while it is saved
    under_way.result()
    dist.barrier()

    steps = [int(name.parent.name.split("-")[1]) for name in Path(path).glob("step-*/.metadata")]
    fresh, other, other_optim = job(2)
    dcp.load(fresh, checkpoint_id=f"{path}/step-{max(steps)}")
    same(plain({**fresh["model"].state_dict(), **fresh["optimizer"].state_dict()}), expected)
    assert (fresh["train_state"].step, fresh["train_state"].losses) == (2, [0.5, 1.0])
    assert fresh["dataloader"].position == 100 + rank
    assert fresh["lr_scheduler"].last_epoch == 2
    step(other, other_optim, features())
    same(plain(fresh["model"].state_dict()), plain(states["model"].state_dict()))

    # The last save has only the model, under its own names and in another dtype.
    weights = {k: v.to(torch.bfloat16) for k, v in states["model"].state_dict().items()}
    dcp.save(weights, checkpoint_id=f"{path}/final")
    again = {k: torch.zeros_like(v) for k, v in weights.items()}
    dcp.load(again, checkpoint_id=f"{path}/final")
    same(plain(again), plain(weights))


@example
def lightning(rank: int, size: int, path: str) -> None:
    """Save sharded FSDP state with a file of rank 0 beside it; load the optimizer separately."""
    from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
    from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict

    def job(seed: int) -> tuple[Any, Any]:
        model = FSDP(made(Mlp, seed), device_id=torch.device("cpu"), use_orig_params=True)
        return model, torch.optim.Adam(model.parameters(), lr=0.01)

    def sharded(model: Any) -> Any:
        return FSDP.state_dict_type(
            model,
            StateDictType.SHARDED_STATE_DICT,
            ShardedStateDictConfig(offload_to_cpu=True),
            ShardedOptimStateDictConfig(offload_to_cpu=True),
        )

    model, optim = job(1)
    step(model, optim, features())
    with sharded(model):
        state = {"model": model.state_dict(), "optimizer_0": FSDP.optim_state_dict(model, optim)}
    if rank == 0:
        Path(path).mkdir(parents=True, exist_ok=True)
        torch.save({"epoch": 3}, f"{path}/meta.pt")
    dist.barrier()
    save(state, storage_writer=FileSystemWriter(path, single_file_per_rank=True))

    other, other_optim = job(2)
    reader = FileSystemReader(path=path)
    with sharded(other):
        found = {"model": other.state_dict()}
        load(found, storage_reader=reader)
        other.load_state_dict(found["model"])
        moments = load_sharded_optimizer_state_dict(
            model_state_dict=other.state_dict(), optimizer_key="optimizer_0", storage_reader=reader
        )
        other_optim.load_state_dict(
            FSDP.optim_state_dict_to_load(other, other_optim, moments["optimizer_0"])
        )
        same(plain(other.state_dict()), plain(state["model"]))
        loaded = FSDP.optim_state_dict(other, other_optim)
        same(plain(loaded["state"]), plain(state["optimizer_0"]["state"]))
    assert (Path(path) / ".metadata").is_file()
    assert torch.load(f"{path}/meta.pt") == {"epoch": 3}


@example
def accelerate(rank: int, size: int, path: str) -> None:
    """Save model and optimizer to separate folders; then merge one into a file without a model."""
    import torch.distributed.checkpoint as dist_cp
    import torch.distributed.checkpoint.format_utils as dist_cp_format_utils
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=False, cpu_offload=True)

    def job(seed: int) -> tuple[Any, Any]:
        model = made(Mlp, seed)
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    model, optim = job(1)
    step(model, optim, features())
    weights = {"model": get_model_state_dict(model, options=options)}
    moments = {"optimizer": get_optimizer_state_dict(model, optim, options=options)}
    for state, name in ((weights, "pytorch_model_fsdp_0"), (moments, "optimizer_0")):
        folder = Path(path) / name
        folder.mkdir(parents=True, exist_ok=True)
        dist_cp.save(
            state_dict=state,
            storage_writer=dist_cp.FileSystemWriter(str(folder)),
            planner=DefaultSavePlanner(),
        )
    random.seed(rank)
    torch.save({"random": random.getstate()}, f"{path}/random_states_{rank}.pkl")

    other, other_optim = job(2)
    found = {"model": get_model_state_dict(other, options=options)}
    dist_cp.load(
        state_dict=found,
        storage_reader=dist_cp.FileSystemReader(f"{path}/pytorch_model_fsdp_0"),
        planner=DefaultLoadPlanner(),
    )
    set_model_state_dict(other, found["model"], options=options)
    held = {"optimizer": get_optimizer_state_dict(other, other_optim, options=options)}
    dist_cp.load(held, checkpoint_id=f"{path}/optimizer_0", planner=DefaultLoadPlanner())
    set_optimizer_state_dict(other, other_optim, held["optimizer"], options=options)
    same(plain(get_model_state_dict(other)), plain(weights["model"]))
    same(plain(get_optimizer_state_dict(other, other_optim)), plain(moments["optimizer"]))

    whole = plain(weights["model"])
    dist.barrier()
    if rank == 0:
        merged: dict[str, Any] = {}
        dist_cp_format_utils._load_state_dict(
            merged,
            storage_reader=dist_cp.FileSystemReader(f"{path}/pytorch_model_fsdp_0"),
            planner=dist_cp_format_utils._EmptyStateDictLoadPlanner(),
            no_dist=True,
        )
        same(merged["model"], dict(whole))
        dist_cp_format_utils.dcp_to_torch_save(f"{path}/pytorch_model_fsdp_0", f"{path}/one.pt")
        same(torch.load(f"{path}/one.pt")["model"], dict(whole))
