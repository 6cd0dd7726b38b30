"""Scenarios of random meshes and placements, and of other kinds of tensors, on real ranks."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import shardkeep as sk
from support.scenarios import same, values

MESHES = [
    torch.arange(4),
    torch.arange(4).reshape(2, 2),
    torch.tensor([[3, 1], [0, 2]]),
    torch.arange(4).reshape(1, 4),
    torch.arange(4).reshape(2, 1, 2),
    torch.tensor([0, 1, 2]),
    torch.tensor([3, 1]),
    torch.tensor([2]),
]
DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.uint16]


def placements(chance: random.Random, mesh: DeviceMesh, ndim: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(mesh.ndim):
        kinds = [Replicate(), *(Shard(dim) for dim in range(ndim))]
        found.append(chance.choice(kinds))
    return found


def held(whole: torch.Tensor, mesh: DeviceMesh, placed: list[Any]) -> DTensor:
    """Return the tensor as a DTensor, cut here by plain chunks from left to right."""
    local = whole
    where = mesh.get_coordinate()
    if where is None:
        local = whole.new_empty(0)
    else:
        for dim, placement in enumerate(placed):
            if isinstance(placement, Shard):
                cut = list(torch.chunk(local, mesh.size(dim), placement.dim))
                rest = local.narrow(placement.dim, 0, 0)
                local = [*cut, *[rest] * mesh.size(dim)][where[dim]]
    return DTensor.from_local(
        local.clone(), mesh, placed, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def reshard_many(
    rank: int, size: int, path: str, seed: int, rounds: int, tensors: int
) -> dict[str, Any]:
    """Save random DTensors and load them into others; return the names of wrong ones."""
    chance = random.Random(seed)
    meshes = [DeviceMesh("cpu", mesh) for mesh in MESHES]
    wrong: list[str] = []
    cases = uneven = outside = 0
    for number in range(rounds):
        first: dict[str, DTensor] = {}
        second: dict[str, DTensor] = {}
        third: dict[str, DTensor] = {}
        for i in range(tensors):
            shape = [chance.choice([0, 1, 2, 3, 4, 5, 7, 8]) for _ in range(chance.randint(1, 3))]
            whole = values(f"{number}.{i}", shape, chance.choice(DTYPES))
            saving, loading = chance.choice(meshes), chance.choice(meshes)
            layout = placements(chance, loading, len(shape))
            first[f"t{i}"] = held(whole, saving, placements(chance, saving, len(shape)))
            for made in (second, third):
                made[f"t{i}"] = held(torch.zeros_like(whole), loading, layout)
            cases += 1
            uneven += any(n % 4 for n in shape)
            outside += saving.size() < size
        sk.save(first, f"{path}/{number}")
        sk.load(second, f"{path}/{number}")
        if number % 4 == 0:
            stock.load(third, checkpoint_id=f"{path}/{number}")
        for i in range(tensors):
            whole = values(f"{number}.{i}", second[f"t{i}"].shape, second[f"t{i}"].dtype)
            made = second[f"t{i}"]
            expected = held(whole, made.device_mesh, list(made.placements)).to_local()
            if not same(made.to_local(), expected):
                wrong.append(f"{number}/t{i}")
            if number % 4 == 0 and not same(third[f"t{i}"].to_local(), expected):
                wrong.append(f"stock {number}/t{i}")
    return {"wrong": wrong, "cases": cases, "uneven": uneven, "outside": outside}


class Pair(torch.Tensor):
    """A wrapper of two tensors: small numbers and the scale of each row."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor) -> Pair:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self.data8, self.scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["data8", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict, meta: Any, size: Any, stride: Any) -> Pair:
        return Pair(inner["data8"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Pair(args[0].data8, args[0].scale)
        raise NotImplementedError(func)


def others(rank: int, size: int, path: str) -> str:
    """Save a ShardedTensor, a subclass, by a group alone, and names that only some ranks have."""
    _sharded(rank, size, f"{path}/sharded")
    _subclass(f"{path}/subclass")
    _some(rank, size, f"{path}/some")
    _groups(rank, path)
    return "fine"


def _sharded_tensor(rank: int, size: int, whole: torch.Tensor, fill: bool) -> Any:
    """Return rows in uneven shards: the second rank has two in swapped order, the last has none."""
    rows = {0: [(0, 3)], 1: [(5, 2), (3, 2)], 2: [(7, 4)], 3: []}
    shards = []
    for start, count in rows[rank]:
        local = whole[start : start + count].clone()
        meta = ShardMetadata([start, 0], [count, whole.shape[1]], f"rank:{rank}/cpu")
        shards.append(sharded_tensor.Shard(local if fill else torch.zeros_like(local), meta))
    return sharded_tensor.init_from_local_shards(shards, *whole.shape)


def _sharded(rank: int, size: int, path: str) -> None:
    whole = values("sharded", (11, 3), torch.float32)
    sk.save({"t": _sharded_tensor(rank, size, whole, True), "step": 4}, path)
    for loader in (sk.load, lambda state, path: stock.load(state, checkpoint_id=path)):
        blank = _sharded_tensor(rank, size, whole, False)
        loader({"t": blank}, path)
        for shard in blank.local_shards():
            start, count = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
            assert same(shard.tensor, whole[start : start + count])
        plain = {"t": torch.zeros_like(whole), "step": 0}
        loader(plain, path)
        assert same(plain["t"], whole)
        assert plain["step"] == 4


def _subclass(path: str) -> None:
    data, scale = values("data", (5, 4), torch.int8), values("scale", (5, 1), torch.bfloat16)
    sk.save({"layer": {"w": Pair(data, scale)}, "bias": scale}, path)
    state = {"layer": {"w": Pair(torch.zeros_like(data), torch.zeros_like(scale))}}
    sk.load(state, path, strict=True)
    assert same(state["layer"]["w"].data8, data)
    assert same(state["layer"]["w"].scale, scale)
    for loader in (sk.load, lambda state, path: stock.load(state, checkpoint_id=path)):
        inner = {"layer.w.data8": torch.zeros_like(data), "layer.w.scale": torch.zeros_like(scale)}
        loader(inner, path)
        assert same(inner["layer.w.data8"], data)
        assert same(inner["layer.w.scale"], scale)


def _some(rank: int, size: int, path: str) -> None:
    """Save and load tensors and objects that only some ranks have."""
    mine = {f"rank{rank}": {"rng": values(f"r{rank}", (8,), torch.uint8), "note": (rank, "x")}}
    if rank == 2:
        mine["only"] = [{"deep": 2}, values("deep", (2,), torch.float64)]
    sk.save({"all": torch.ones(3), "per": mine}, path)
    everything: dict[str, Any] = {
        f"rank{r}": {"rng": torch.zeros(8, dtype=torch.uint8), "note": None} for r in range(size)
    }
    everything["only"] = [{"deep": 0}, torch.zeros(2, dtype=torch.float64)]
    state = {"all": torch.zeros(3), "per": everything}
    sk.load(state, path)
    for r in range(size):
        assert same(everything[f"rank{r}"]["rng"], values(f"r{r}", (8,), torch.uint8))
        assert everything[f"rank{r}"]["note"] == (r, "x")
    assert everything["only"][0] == {"deep": 2}
    assert same(everything["only"][1], values("deep", (2,), torch.float64))
    other = {f"per.rank{r}.rng": torch.zeros(8, dtype=torch.uint8) for r in range(size)}
    stock.load(other, checkpoint_id=path)
    assert same(other["per.rank3.rng"], values("r3", (8,), torch.uint8))


def _groups(rank: int, path: str) -> None:
    """Save on ranks 1 and 3 while ranks 0 and 2 save another state."""
    group = [1, 3] if rank % 2 else [2, 0]
    name, meshes = "b" if rank % 2 else "a", {}
    for members in ([1, 3], [2, 0]):  # torch requires that all ranks create every group
        meshes[members[0]] = DeviceMesh("cpu", torch.tensor(members))
    whole = values(name, (5, 2), torch.float32)
    mesh = meshes[group[0]]
    for turn in range(3):
        state = {"w": held(whole, mesh, [Shard(0)]), "turn": turn}
        sk.save(state, f"{path}/{name}", ranks=group, overwrite=True)
    blank = {"w": held(torch.zeros_like(whole), mesh, [Shard(1)]), "turn": None}
    sk.load(blank, f"{path}/{name}", ranks=group)
    assert same(blank["w"].to_local(), held(whole, mesh, [Shard(1)]).to_local())
    assert blank["turn"] == 2
    dist.barrier()
    one = {
        "w": distribute_tensor(torch.zeros(5, 2), DeviceMesh("cpu", torch.arange(4)), [Shard(0)])
    }
    sk.load(one, f"{path}/a")
    assert same(one["w"].full_tensor(), values("a", (5, 2), torch.float32))
