"""Pieces of DTensors on real processes, put together and compared bit for bit."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from shardkeep.errors import Conflict
from shardkeep.torch_state.pieces import TensorDescription, describe_tensor

try:
    from torch.distributed.tensor import (
        DTensor,
        Partial,
        Replicate,
        Shard,
        distribute_tensor,
        placement_types,
    )
except ImportError:  # 2.4
    from torch.distributed._tensor import (
        DTensor,
        Partial,
        Replicate,
        Shard,
        distribute_tensor,
        placement_types,
    )

STRIDED = hasattr(placement_types, "_StridedShard")  # 2.5 and later
NEWER = "src_data_rank" in inspect.signature(distribute_tensor).parameters  # 2.6 and later
NO_ROWS = 0 if NEWER else 1  # older ones can't distribute an empty tensor

Shipped = tuple[str, tuple[int, ...], list[tuple[tuple[int, ...], Any]]]


def ship(described: tuple[TensorDescription, ...]) -> list[Shipped]:
    """Return what the parent compares: dtype, shape, and offsets and values of each piece."""
    return [
        (one.dtype.name, one.shape, [(p.box.offsets, p.local.numpy().copy()) for p in one.pieces])
        for one in described
    ]


def assemble(ranks: list[Shipped], copies: int) -> Any:
    """Return the whole tensor, of which all pieces together must have `copies` equal copies."""
    (shape,) = {shape for _, shape, _ in ranks}
    (dtype,) = {dtype for dtype, _, _ in ranks}
    whole = torch.zeros(shape, dtype=getattr(torch, dtype))
    count = torch.zeros(shape, dtype=torch.int64)
    for _, _, pieces in ranks:
        for offsets, values in pieces:
            place = tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))
            local = torch.from_numpy(values)
            assert local.numel()
            assert torch.equal(whole[place][count[place] > 0], local[count[place] > 0])
            whole[place] = local
            count[place] += 1
    assert (count == copies).all()
    return whole


def distributed(rank: int, size: int, seed: int) -> list[tuple[Any, int, list[Shipped]]]:
    """Return (whole tensor, copies, pieces of this rank) for random shapes and placements."""
    from torch.distributed.device_mesh import init_device_mesh

    random = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=random))

    found = []
    for sides in ((size,), (2, size // 2)) if size > 2 else ((size,),):
        mesh = init_device_mesh("cpu", sides)
        for _ in range(4):
            shape = [pick(NO_ROWS, 8) for _ in range(pick(1, 4))]
            whole = torch.randn(shape, generator=random)
            dims = [pick(-1, len(shape)) for _ in sides]
            dims = dims if STRIDED else [dims[0], *[-1 for _ in sides[1:]]]
            placements = [Shard(dim) if dim >= 0 else Replicate() for dim in dims]
            made = distribute_tensor(whole, mesh, placements)
            copies = 1
            for side, dim in zip(sides, dims, strict=True):
                copies *= side if dim < 0 else 1
            found.append((whole.numpy(), copies, ship(describe_tensor("x", made))))
    return found


@pytest.mark.parametrize("seed", range(2))
def test_the_pieces_of_all_ranks_make_up_the_whole_tensor(gloo: Any, seed: int) -> None:
    ranks = gloo.run(distributed, seed)
    for case in zip(*ranks, strict=True):
        whole, copies, _ = case[0]
        assembled = assemble([shipped[0] for _, _, shipped in case], copies)
        assert torch.equal(assembled, torch.from_numpy(whole))


def fsdp_and_tp(rank: int, size: int, rows: int) -> dict[str, Any]:
    """Cut a linear layer by columns and by rows over 2 ranks, then shard it over 2 others."""
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        from torch.distributed._composable.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(6, rows), nn.Linear(rows, 6), nn.Linear(6, 5))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + 1000 * number)
    expected = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    # FSDP2 refuses to cut unevenly along any other dimension than the first.
    fully_shard(model, mesh=mesh["dp"])
    held = {}
    for name, value in model.state_dict().items():
        assert isinstance(value, DTensor)
        held[name] = (expected[name], str(value.placements), ship(describe_tensor(name, value))[0])
    return held


UNEVEN = pytest.mark.skipif(not NEWER, reason="this torch refuses uneven FSDP2 with TP")


@pytest.mark.skipif(not STRIDED, reason="torch 2.4 does not describe strided shards")
@pytest.mark.parametrize("rows", [8, *(pytest.param(n, marks=UNEVEN) for n in (7, 5, 2))])
def test_fsdp2_over_tensor_parallelism(gloo: Any, rows: int) -> None:
    ranks = gloo.run(fsdp_and_tp, rows)
    copies = {"1.bias": 2, "2.weight": 2, "2.bias": 2}
    for name, (whole, placements, _) in ranks[0].items():
        assembled = assemble([held[name][2] for held in ranks], copies.get(name, 1))
        assert torch.equal(assembled, torch.from_numpy(whole)), (name, placements)
    assert "_StridedShard" in ranks[0]["0.weight"][1]


def doubly_cut(rank: int, size: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2))
    made = distribute_tensor(torch.arange(8.0), mesh, [Shard(0), Shard(0)])
    try:
        return str(describe_tensor("x", made)[0].pieces[0].box)
    except Conflict as error:
        return str(error)


def test_a_dimension_cut_twice(gloo: Any) -> None:
    """In torch 2.4, FSDP2 over tensor parallelism has the same placements with another meaning."""
    found = gloo.run(doubly_cut)
    if STRIDED:
        assert found == ["[0:2]", "[2:4]", "[4:6]", "[6:8]"]
    else:
        assert all("use torch 2.5 or later" in message for message in found)


def part_of_the_ranks(rank: int, size: int) -> Any:
    """Make a mesh of the first two ranks: the others have the tensor, but no piece of it."""
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh("cpu", [0, 1])
    made = distribute_tensor(torch.arange(6.0), mesh, [Shard(0)])
    assert isinstance(made, DTensor)
    return ship(describe_tensor("x", made))[0]


def test_ranks_outside_the_mesh_have_the_tensor_without_pieces(gloo: Any) -> None:
    ranks = gloo.run(part_of_the_ranks)
    assert [len(pieces) for _, _, pieces in ranks] == [1, 1, 0, 0]
    assert torch.equal(assemble(ranks, 1), torch.arange(6.0))


def refused(rank: int, size: int) -> list[str]:
    """Return the errors for tensors that cannot be saved."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.two_tensor import TwoTensor

    mesh = init_device_mesh("cpu", (size,))
    local = torch.zeros(2, 3)
    cases = [
        DTensor.from_local(local, mesh, [Partial()]),
        DTensor.from_local(TwoTensor(local, local), mesh, [Shard(0)]),
        DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size([9, 3]), stride=(3, 1)),
    ]
    messages = []
    for value in cases:
        try:
            describe_tensor("layer.w", value)
        except Conflict as error:
            messages.append(str(error))
    return messages


def test_tensors_that_cannot_be_saved_are_refused_by_name(gloo: Any) -> None:
    for rank, messages in enumerate(gloo.run(refused, size=2)):
        partial, subclass, shape = messages
        assert "'layer.w' is P" in partial
        assert "its values are not summed up" in partial
        assert "'layer.w' is a DTensor of torch.testing._internal.two_tensor.TwoTensor" in subclass
        assert f"'layer.w': the local tensor of the rank at [{rank}] of a mesh of [2]" in shape
        assert "has the shape [2, 3]" in shape


def sharded(rank: int, size: int) -> list[Shipped]:
    """Make a ShardedTensor with two shards on one rank and none on another."""
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharded_tensor import (
        Shard,
        ShardedTensorMetadata,
        TensorProperties,
    )
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor

    spread = [([0, 0], [2, 4], 0), ([2, 0], [3, 1], 0), ([2, 1], [3, 3], 1)]
    places = [
        ShardMetadata(offsets, sizes, f"rank:{owner}/cpu") for offsets, sizes, owner in spread
    ]
    whole = torch.arange(20.0).view(5, 4)
    mine = [
        Shard(whole[o[0] : o[0] + s[0], o[1] : o[1] + s[1]].clone(), place)
        for (o, s, owner), place in zip(spread, places, strict=True)
        if owner == rank
    ]
    meta = ShardedTensorMetadata(places, torch.Size([5, 4]), TensorProperties(torch.float32))
    made = ShardedTensor._init_from_local_shards_and_global_metadata(mine, meta)
    return ship(describe_tensor("x", made))


def test_sharded_tensors(gloo: Any) -> None:
    ranks = gloo.run(sharded, size=3)
    assert [len(pieces) for ((_, _, pieces),) in ranks] == [2, 1, 0]
    assert torch.equal(assemble([one for (one,) in ranks], 1), torch.arange(20.0).view(5, 4))


def ordered(rank: int, size: int) -> Any:
    """Make plain shards of one dimension that cut in another sequence than left to right."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2))
    made = distribute_tensor(torch.arange(7.0), mesh, [Replicate(), Replicate()])
    from torch.distributed.tensor import _dtensor_spec as specs
    from torch.distributed.tensor._redistribute import redistribute_local_tensor

    order = (specs.ShardOrderEntry(tensor_dim=0, mesh_dims=(1, 0)),)
    spec = specs.DTensorSpec(
        mesh, (Shard(0), Shard(0)), tensor_meta=made._spec.tensor_meta, shard_order=order
    )
    local = redistribute_local_tensor(made.to_local(), made._spec, spec)
    placed = DTensor(local, spec, requires_grad=False)
    return mesh.get_coordinate(), ship(describe_tensor("x", placed))[0]


def test_a_shard_order_is_followed(gloo: Any) -> None:
    specs = pytest.importorskip("torch.distributed.tensor._dtensor_spec")
    if not hasattr(specs, "ShardOrderEntry"):
        pytest.skip("this torch knows no shard order")
    ranks = gloo.run(ordered)
    assert torch.equal(assemble([shipped for _, shipped in ranks], 1), torch.arange(7.0))
    starts = {tuple(at): [offsets for offsets, _ in held] for at, (_, _, held) in ranks}
    assert starts == {(0, 0): [(0,)], (0, 1): [(4,)], (1, 0): [(2,)], (1, 1): [(6,)]}


def test_uneven_fsdp2_over_tensor_parallelism() -> None:
    """7 rows on 3 x 2 ranks: applying strided shards from left to right would be wrong.

    Each rank is pretended in turn; nothing is sent.
    """
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if "src_data_rank" not in inspect.signature(parallelize_module).parameters:
        pytest.skip("this torch distributes modules by sending only")
    from torch.distributed.fsdp import fully_shard

    expected = torch.arange(21.0).view(7, 3)
    ranks = []
    for rank in range(6):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=6)
        try:
            names = (f"dp{rank}", f"tp{rank}")  # A mesh of the same names would be remembered.
            mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=names)
            layer = nn.Linear(3, 7, bias=False)
            with torch.no_grad():
                layer.weight.copy_(expected)
            parallelize_module(layer, mesh[names[1]], ColwiseParallel(), src_data_rank=None)
            fully_shard(layer, mesh=mesh[names[0]])
            ranks += ship(describe_tensor("weight", layer.weight))
        finally:
            dist.destroy_process_group()
    assert torch.equal(assemble(ranks, 1), expected)
    assert [[o[0] for o, _ in pieces] for _, _, pieces in ranks] == [[0], [4], [2], [5], [], [6]]


@pytest.mark.skipif(not STRIDED, reason="this torch knows no strided shards")
def test_similar_layouts_are_not_confused() -> None:
    """Layouts are cached, and torch may call a strided shard equal to a plain one."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    shard, strided = Shard(0), placement_types._StridedShard(0, split_factor=2)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("alike0", "alike1"))
        found = []
        for first in (shard, strided, shard):
            value = DTensor.from_local(
                torch.zeros(2), mesh, (first, shard), run_check=False, shape=(8,), stride=(1,)
            )
            assert value.placements == (first, shard)
            ((_, _, ((offsets, _),)),) = ship(describe_tensor("w", value))
            found.append(offsets)
    finally:
        dist.destroy_process_group()
    assert found == [(2,), (4,), (2,)]


def test_a_partial_tensor_is_refused_on_ranks_that_have_none_of_it_too() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    try:
        mesh = DeviceMesh("cpu", [0, 1])
        assert mesh.get_coordinate() is None
        for placement, what in ((Partial(), "not summed up"), (Replicate(), None)):
            value = DTensor.from_local(torch.zeros(2), mesh, [placement], run_check=False)
            if what is None:
                assert describe_tensor("w", value)[0].pieces == ()
                continue
            with pytest.raises(Conflict, match=what):
                describe_tensor("w", value)
    finally:
        dist.destroy_process_group()
