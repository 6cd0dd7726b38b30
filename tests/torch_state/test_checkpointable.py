"""Plain tensors whose attributes describe the shards that they hold."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shardkeep as sk
from shardkeep.errors import Conflict
from shardkeep.testing import simulated_ranks
from shardkeep.torch_state.checkpointable import is_checkpointable
from shardkeep.types import Box


def part(local, shape, offsets, places, sizes):
    local.global_shape, local.global_offsets = shape, offsets
    local.local_offsets, local.local_sizes = places, sizes
    return local


def rows(rank, fill):
    """Return a rank's rows of a 6 x 3 tensor, in a buffer with a row of padding between them."""
    local = torch.full((5, 3), -1.0)
    if fill:
        whole = torch.arange(18.0).reshape(6, 3)
        local[0:2], local[3:4] = whole[rank * 2 : rank * 2 + 2], whole[4 + rank : 5 + rank]
    return part(
        local,
        (6, 3),
        ((rank * 2, 0), (4 + rank, 0)),
        ((0, 0), (3, 0)),
        ((2, 3), (1, 3)),
    )


def save_and_load(ranks, path):
    sk.save({"w": rows(ranks.rank, True)}, path, ranks=ranks)
    loaded = rows(ranks.rank, False)
    sk.load({"w": loaded}, path, ranks=ranks)
    return loaded


def test_shards_are_saved_as_parts_of_the_global_tensor(tmp_path):
    loaded = simulated_ranks.run(2, save_and_load, tmp_path)
    whole = torch.zeros(6, 3)
    sk.load({"w": whole}, tmp_path)
    assert torch.equal(whole, torch.arange(18.0).reshape(6, 3))
    for rank, local in enumerate(loaded):
        assert torch.equal(local, rows(rank, True))  # the padding is untouched
    assert sk.open(tmp_path).tensor("w").shape == (6, 3)
    assert {chunk.box for chunk in sk.open(tmp_path).tensor("w").chunks} == {
        Box((0, 0), (2, 3)), Box((2, 0), (2, 3)), Box((4, 0), (1, 3)), Box((5, 0), (1, 3)),
    }  # fmt: skip


def test_a_tensor_without_all_four_attributes_is_a_plain_one(tmp_path):
    plain = torch.ones(2)
    plain.global_shape = (4,)
    assert not is_checkpointable(plain)
    sk.save({"w": plain}, tmp_path)
    assert sk.open(tmp_path).tensor("w").shape == (2,)


@pytest.mark.parametrize(
    ("offsets", "places", "sizes", "why"),
    [
        (((0,), (2,)), ((0,),), ((2,),), "lists 2 global offsets, 1 local offsets and 1 local"),
        (((3,),), ((0,),), ((2,),), r"the shard \[3:5\] is not inside the global shape \[4\]"),
        (((0,),), ((1,),), ((2,),), r"the shard \[1:3\] is not inside the local shape \[2\]"),
        (((0, 0),), ((0,),), ((2,),), r"the shard at \(0, 0\) has another number of dimensions"),
    ],
)
def test_shards_that_do_not_fit_are_refused(tmp_path, offsets, places, sizes, why):
    with pytest.raises(Conflict, match=f"tensor 'w'.*{why}"):
        sk.save({"w": part(torch.zeros(2), (4,), offsets, places, sizes)}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_objects_that_contain_one_are_refused(tmp_path):
    with pytest.raises(Conflict, match="of which each rank has only a part"):
        sk.save({"w": (rows(0, True),)}, tmp_path)
