"""The messages of a save make one checkpoint from the claims of all ranks, without torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import shardkeep as sk
from shardkeep.checkpoint import commit
from shardkeep.engine.negotiate import negotiate_writers, report
from shardkeep.format.torch_zip.container_write import TensorFraming
from shardkeep.stores import MemoryStore
from shardkeep.testing import simulated_ranks
from shardkeep.types import Box, Claim, DType, Structure, Tensors
from support.written_items import write_items

SHAPE = (64, 48)
WHOLE = np.arange(64 * 48, dtype=np.float32).reshape(SHAPE)
from support.store_files import names_in


def claim(rank: int, size: int, *, note: str = "same") -> Claim:
    """Return a claim: rows of a tensor, a replica, a tensor and an object of this rank alone."""
    rows = SHAPE[0] // size
    mine, alone = f"rank.{rank}.bias", f"rank.{rank}.note"
    shapes = [SHAPE, (), (rank + 1,)]
    names = ("weight", "scale", mine)
    padded = np.ones((3, 2), dtype=np.int64)
    sizes = padded.copy()
    for row, shape in enumerate(shapes):
        padded[row, : len(shape)] = sizes[row, : len(shape)] = shape
    sizes[0, 0] = rows
    float32 = DType.named("float32").code
    leaves = {"weight": ("weight",), "scale": ("scale",), "note": ("note",)}
    leaves |= {mine: ("rank", rank, "bias"), alone: ("rank", rank, "note")}
    return Claim(
        tensors=Tensors(
            names,
            np.full(3, float32, dtype=np.uint8),
            np.array([len(shape) for shape in shapes], dtype=np.uint8),
            padded,
        ),
        piece=np.arange(3),
        offsets=np.array([[rank * rows, 0], [0, 0], [0, 0]]),
        sizes=sizes,
        alias=np.arange(3),
        objects=("note", alone),
        values={"note": note, alone: rank},
        structure=Structure(leaves, {(): "dict", ("rank",): "dict", ("rank", rank): "dict"}),
        legacy_duplicates={},
    )


def shape(mine: Claim, row: int) -> tuple[int, ...]:
    return tuple(mine.sizes[row, : mine.tensors.ndim[row]].tolist())


def data(mine: Claim, rank: int, row: int) -> bytes:
    if row == 0:
        start, count = int(mine.offsets[0, 0]), int(mine.sizes[0, 0])
        return WHOLE[start : start + count].tobytes()
    return np.full(1 if row == 1 else rank + 1, 7 if row == 1 else rank, np.float32).tobytes()


def save(ranks, store, **options) -> str:
    """Save with numpy in the place of torch, and return the id of the save."""
    with ranks.session("save", "memory") as session:
        mine = claim(ranks.rank, ranks.size, **options)
        order = negotiate_writers(session, mine, admit=lambda: None)
        items = [
            (
                TensorFraming(DType.named("float32"), shape(mine, row)),
                memoryview(data(mine, ranks.rank, row)),
            )
            for row in order.pieces.tolist()
        ]
        items += [(None, memoryview(name.encode())) for name in order.objects]
        file = commit.data_file(ranks.rank, 0, order.save_id)
        written = write_items(store, {file: items} if items else {})
        reports = report(session, order, written)
        if reports is not None:
            commit.publish(store, order.save_id, reports.index, {})
        session.broadcast(b"" if reports is not None else None)
    return order.save_id


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_simulated_ranks_make_one_checkpoint(size):
    store = MemoryStore()
    ids = simulated_ranks.run(size, save, store)
    assert len(set(ids)) == 1
    checkpoint = sk.open(store)
    assert checkpoint.verify().ok
    assert (checkpoint.read("weight") == WHOLE).all()
    assert checkpoint.read("weight", Box((3, 5), (50, 2))).tolist() == WHOLE[3:53, 5:7].tolist()
    assert len(checkpoint["weight"].chunks) == size
    assert len(checkpoint["scale"].chunks) == 1
    for rank in range(size):
        assert checkpoint.read(f"rank.{rank}.bias").tolist() == [rank] * (rank + 1)
    tree = checkpoint.tree()
    assert list(tree["rank"]) == list(range(size))
    assert [tree["rank"][rank]["note"] for rank in range(size)] == list(range(size))


def test_a_rank_that_writes_nothing_has_no_file():
    store = MemoryStore()
    simulated_ranks.run(4, save, store)
    names = [name for name in names_in(store) if name.endswith(".distcp")]
    (scale,) = sk.open(store)["scale"].chunks
    assert len(names) == 4
    assert sum(scale.item.file == name for name in names) == 1


def test_a_refusal_is_the_same_on_every_rank():
    def contradict(ranks):
        with pytest.raises(sk.Conflict) as caught:
            save(ranks, store, note=f"rank {ranks.rank}")
        return str(caught.value)

    store = MemoryStore()
    (message,) = set(simulated_ranks.run(3, contradict))
    assert message.startswith("object 'note' has different values on ranks 0 and 1")
    assert not list(names_in(store))


def test_names_with_different_lone_surrogates_stay_different():
    odd = "\ud800\udc00"

    def settled(ranks):
        with ranks.session("save", "memory") as session:
            leaves = {"weight": ("weight",), odd: (odd,)}
            mine = replace(
                claim(0, 1),
                objects=(odd,),
                values={odd: ranks.rank},
                structure=Structure(
                    {**leaves, "scale": ("scale",), "rank.0.bias": ("rank.0.bias",)}, {(): "dict"}
                ),
            )
            return negotiate_writers(
                session, mine, admit=lambda: None, require_identical_objects=False
            ).objects

    assert simulated_ranks.run(2, settled) == [(odd,), ()]
