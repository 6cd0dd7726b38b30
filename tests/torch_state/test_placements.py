"""Boxes of sharded tensors, compared with plain index lists and with DTensor itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")  # the package's own imports need it; the functions do not

from shardkeep.torch_state.placements import (
    PlacedBox,
    Placement,
    Replicate,
    Shard,
    StridedShard,
    cut_order,
    placed_boxes,
)
from shardkeep.types import Box

Layout = tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]]


@st.composite
def layouts(draw: st.DrawFn, strided: bool = True) -> Layout:
    """Return (shape, mesh shape, placements): up to 8 ranks on up to 3 mesh dimensions."""
    shape = tuple(draw(st.lists(st.integers(0, 13), min_size=1, max_size=3)))
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    assume(prod(mesh) <= 8)
    dims = st.integers(0, len(shape) - 1)
    one: st.SearchStrategy[Placement] = st.just(Replicate()) | st.builds(Shard, dims)
    if strided:
        one |= st.builds(StridedShard, dims, st.integers(1, 4))
    return shape, mesh, tuple(draw(st.lists(one, min_size=len(mesh), max_size=len(mesh))))


def coordinates(mesh: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return product(*map(range, mesh))


def chunk(indices: list[int], count: int, index: int) -> list[int]:
    size = -(-len(indices) // count)
    return indices[index * size : (index + 1) * size]


def held(
    shape: Sequence[int],
    mesh: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
    sequence: Sequence[int],
) -> list[list[int]]:
    """Return the global indices of each dimension, one by one."""
    found = [list(range(size)) for size in shape]
    for axis in sequence:
        placement = placements[axis]
        if isinstance(placement, Replicate):
            continue
        pieces = [found[placement.dim]]
        if isinstance(placement, StridedShard):
            factor = placement.split_factor
            pieces = [chunk(pieces[0], factor, i) for i in range(factor)]
        cut = [chunk(piece, mesh[axis], coordinate[axis]) for piece in pieces]
        found[placement.dim] = [index for piece in cut for index in piece]
    return found


def test_a_strided_shard_is_several_boxes() -> None:
    found = placed_boxes((8, 3), (2, 2), (0, 0), (Shard(1), StridedShard(0, 2)))
    assert found == (
        PlacedBox(Box((0, 0), (2, 2)), (slice(0, 2), slice(0, 2))),
        PlacedBox(Box((4, 0), (2, 2)), (slice(2, 4), slice(0, 2))),
    )


def test_scalars_and_empties() -> None:
    assert placed_boxes((), (2,), (1,), (Replicate(),)) == (PlacedBox(Box((), ()), ()),)
    assert placed_boxes((0, 3), (2,), (0,), (Replicate(),)) == ()
    assert placed_boxes((2, 3), (4,), (2,), (Shard(0),)) == ()
    with pytest.raises(
        ValueError, match=r"Shard\(dim=0\) is not possible for a tensor of 0 dimensions"
    ):
        placed_boxes((), (2,), (1,), (Shard(0),))


@given(layouts(), st.randoms())
def test_boxes_hold_the_indices_that_cutting_one_by_one_leaves(layout: Layout, random: Any) -> None:
    shape, mesh, placements = layout
    sequence = list(range(len(mesh)))
    random.shuffle(sequence)
    whole = np.arange(prod(shape)).reshape(shape)
    for coordinate in coordinates(mesh):
        expected = whole[np.ix_(*held(shape, mesh, coordinate, placements, sequence))]
        local = np.full(expected.shape, -1)
        found = placed_boxes(shape, mesh, coordinate, placements, sequence)
        for part in found:
            assert part.box.within(shape)
            assert part.box.numel
            assert (local[part.local] == -1).all()
            local[part.local] = whole[part.box.slices]
        assert (local == expected).all()
        assert (found == ()) == (expected.size == 0)


@given(layouts())
def test_all_ranks_tile_the_tensor_as_often_as_it_is_replicated(layout: Layout) -> None:
    shape, mesh, placements = layout
    count = np.zeros(shape, dtype=int)
    for coordinate in coordinates(mesh):
        for part in placed_boxes(shape, mesh, coordinate, placements):
            count[part.box.slices] += 1
    pairs = zip(mesh, placements, strict=True)
    assert (count == prod(size for size, one in pairs if isinstance(one, Replicate))).all()


@given(layouts(strided=False), st.randoms())
def test_a_sequence_of_cuts_equals_its_strided_shards(layout: Layout, random: Any) -> None:
    """torch writes a factor for each later mesh dimension that cuts earlier."""
    shape, mesh, placements = layout
    sequence = list(range(len(mesh)))
    random.shuffle(sequence)
    strided: list[Placement] = []
    for axis, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            strided.append(placement)
            continue
        before = [a for a in sequence[: sequence.index(axis)] if a > axis]
        factor = prod(mesh[a] for a in before if placements[a] == placement)
        strided.append(placement if factor == 1 else StridedShard(placement.dim, factor))
    assert cut_order(mesh, strided) is not None
    for coordinate in coordinates(mesh):
        expected = placed_boxes(shape, mesh, coordinate, placements, sequence)
        assert placed_boxes(shape, mesh, coordinate, strided) == expected


def test_the_two_interpretations_differ_only_for_uneven_cuts() -> None:
    differ = {}
    for mesh in product(range(1, 5), range(1, 5)):
        placements = (StridedShard(0, mesh[1]), Shard(0))
        for size in range(40):
            readings = [
                [placed_boxes((size,), mesh, at, placements, sequence) for at in coordinates(mesh)]
                for sequence in (None, (0, 1))
            ]
            if readings[0] != readings[1]:
                differ.setdefault(mesh, []).append(size)
    assert differ[(3, 2)] == [7, 13, 19, 25, 31, 37]
    assert all(size % prod(mesh) for mesh, sizes in differ.items() for size in sizes)


def test_a_factor_that_no_sequence_explains_is_applied_from_left_to_right() -> None:
    placements = (StridedShard(0, 3), Shard(0))
    assert cut_order((2, 2), placements) is None
    assert placed_boxes((12,), (2, 2), (1, 0), placements) == placed_boxes(
        (12,), (2, 2), (1, 0), placements, (0, 1)
    )


# --- against DTensor -------------------------------------------------------------------------


@contextmanager
def rank_of(mesh: Sequence[int], rank: int) -> Iterator[Any]:
    """Make the mesh of this rank in a fake job, in which nothing is ever sent."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=prod(mesh))
    try:
        yield init_device_mesh("cpu", tuple(mesh))
    finally:
        dist.destroy_process_group()


def theirs(placements: Sequence[Placement]) -> list[Any]:
    from torch.distributed import tensor

    made: list[Any] = []
    for one in placements:
        if isinstance(one, StridedShard):
            made.append(
                tensor.placement_types._StridedShard(one.dim, split_factor=one.split_factor)
            )
        else:
            made.append(tensor.Shard(one.dim) if isinstance(one, Shard) else tensor.Replicate())
    return made


MESHES = [(1,), (2,), (5,), (8,), (2, 2), (2, 4), (4, 2), (3, 2), (2, 2, 2), (1, 3, 2)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_local_tensors_are_those_of_dtensor(mesh: tuple[int, ...]) -> None:
    pytest.importorskip("torch.distributed.tensor.placement_types")
    from torch.distributed.tensor import distribute_tensor

    if "src_data_rank" not in inspect.signature(distribute_tensor).parameters:
        pytest.skip("this torch distributes tensors by sending only")
    random = np.random.default_rng(prod(mesh))
    cases = []
    for _ in range(12):
        shape = tuple(random.integers(0, 14, random.integers(1, 4)).tolist())
        picked = random.integers(-1, len(shape), len(mesh)).tolist()
        cases.append((shape, [Shard(dim) if dim >= 0 else Replicate() for dim in picked]))
    for rank, coordinate in enumerate(coordinates(mesh)):
        with rank_of(mesh, rank) as device_mesh:
            for shape, placements in cases:
                whole = torch.arange(prod(shape)).reshape(shape)
                made = distribute_tensor(whole, device_mesh, theirs(placements), src_data_rank=None)
                local = made.to_local()
                found = placed_boxes(shape, mesh, coordinate, placements)
                assert sum(part.box.numel for part in found) == local.numel()
                for part in found:
                    assert torch.equal(local[part.local], whole[part.box.slices])


@pytest.mark.parametrize("mesh", [(2, 2), (4, 2), (2, 4), (3, 2), (2, 2, 2)], ids=str)
def test_first_offsets_and_sizes_are_those_of_torch_for_strided_shards(mesh: Any) -> None:
    """torch's helper cuts from left to right, and returns one offset for all pieces of a rank."""
    helper = pytest.importorskip("torch.distributed.tensor._utils")
    compute = getattr(helper, "_compute_local_shape_and_global_offset", None)
    if compute is None:
        pytest.skip("this torch has no helper that works without a mesh")
    random = np.random.default_rng(7)
    for _ in range(60):
        shape = tuple(random.integers(1, 25, 2).tolist())
        factor, dim = int(random.integers(1, 5)), int(random.integers(0, 2))
        placements = [StridedShard(dim, factor), *[Shard(dim)] * (len(mesh) - 1)]
        for coordinate in coordinates(mesh):
            sizes, offsets = compute(shape, mesh, list(coordinate), theirs(placements))
            found = placed_boxes(shape, mesh, coordinate, placements, range(len(mesh)))
            assert prod(sizes) == sum(part.box.numel for part in found)
            if found:
                assert offsets == found[0].box.offsets
