"""Assignment of writers: every payload is written once, by a rank that holds it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkeep.errors import Conflict
from shardkeep.plan.assign_writers import assign_writers
from shardkeep.types import Box, Claim, DType, Structure, Tensors


def claim(tensors=(), objects=None, *, legacy_duplicates=None, containers=None, alias=None):
    """Return the claim of a rank. Tensors are (name, dtype, shape, [boxes])."""
    width = max((len(shape) for _, _, shape, _ in tensors), default=0)

    def padded(rows, fill):
        out = np.full((len(rows), width), fill, dtype=np.int64)
        for i, row in enumerate(rows):
            out[i, : len(row)] = row
        return out

    boxes = [box for *_, held in tensors for box in held]
    counts = [len(held) for *_, held in tensors]
    names = [name for name, *_ in tensors]
    objects = objects or {}
    paths = {name: tuple(name.split(".")) for name in [*names, *objects]}
    known = {(): "dict"}
    for path in paths.values():
        known |= {path[:depth]: "dict" for depth in range(1, len(path))}
    return Claim(
        tensors=Tensors(
            tuple(names),
            np.array([DType.named(dtype).code for _, dtype, _, _ in tensors], dtype=np.uint8),
            np.array([len(shape) for _, _, shape, _ in tensors], dtype=np.uint8),
            padded([shape for _, _, shape, _ in tensors], 1),
        ),
        piece=np.repeat(np.arange(len(names), dtype=np.int64), counts),
        offsets=padded([box.offsets for box in boxes], 0),
        sizes=padded([box.sizes for box in boxes], 1),
        alias=np.arange(len(boxes)) if alias is None else np.array(alias),
        objects=tuple(objects),
        values=objects,
        structure=Structure(paths, known | (containers or {})),
        legacy_duplicates=legacy_duplicates or {},
    )


def whole(name, *shape, dtype="float32"):
    return (name, dtype, shape, [Box.whole(shape)])


def rows(name, shape, start, stop, dtype="float32"):
    box = Box((start, *[0] * (len(shape) - 1)), (stop - start, *shape[1:]))
    return (name, dtype, shape, [box])


@st.composite
def jobs(draw):
    """Generate claims on tensors that are cut into rows, each held by at least one rank."""
    ranks = draw(st.integers(1, 5))
    held = [[] for _ in range(ranks)]
    for t in range(draw(st.integers(0, 5))):
        shape = (draw(st.integers(1, 12)), draw(st.integers(0, 3)))
        cuts = sorted({0, shape[0], *draw(st.lists(st.integers(0, shape[0]), max_size=4))})
        parts = list(pairwise(cuts))
        holders = [draw(st.sets(st.integers(0, ranks - 1), min_size=1)) for _ in parts]
        for rank in range(ranks):
            mine = [p for p, who in zip(parts, holders, strict=True) if rank in who]
            boxes = [Box((a, 0), (b - a, shape[1])) for a, b in mine]
            if mine or draw(st.booleans()):
                held[rank].append((f"t{t}", "int16", shape, boxes))
    return [claim(tensors) for tensors in held]


@given(jobs())
def test_every_box_is_written_once_by_a_rank_that_holds_it(claims):
    done = assign_writers(claims)
    distinct = {
        (c.tensors.names[t], tuple(o), tuple(s))
        for c in claims
        for t, o, s in zip(c.piece, c.offsets.tolist(), c.sizes.tolist(), strict=True)
    }
    width = done.offsets.shape[1]
    chunks = [
        (done.tensors.names[t], tuple(o), tuple(s))
        for t, o, s in zip(done.tensor, done.offsets.tolist(), done.sizes.tolist(), strict=True)
    ]
    assert len(chunks) == len(set(chunks))
    assert {(n, o[:width], s[:width]) for n, o, s in distinct} == set(chunks)
    assert (np.diff(done.tensor) >= 0).all()
    for chunk, payload in zip(chunks, done.payload, strict=True):
        writer = claims[done.writer[payload]]
        piece = done.piece[payload]
        name = writer.tensors.names[writer.piece[piece]]
        assert (name, tuple(writer.offsets[piece]), tuple(writer.sizes[piece])) == chunk
    ordered = [pieces.tolist() for pieces, _ in done.orders(len(claims))]
    for rank, mine in enumerate(ordered):
        assert mine == sorted(done.piece[done.writer == rank])
    assert sum(map(len, ordered)) == len(done.writer)
    assert all(mine == sorted(mine) for mine in ordered)


def test_ranks_may_hold_tensors_that_others_lack():
    done = assign_writers([claim([whole("a", 2)]), claim([whole("b", 3, 4)]), claim()])
    assert done.tensors.names == ("a", "b")
    assert done.tensors.shape.tolist() == [[2, 1], [3, 4]]
    assert done.writer.tolist() == [0, 1]


def test_aliases_are_one_payload():
    tied = claim([whole("head", 4, 4), whole("embed", 4, 4), whole("x", 4, 4)], alias=[0, 0, 2])
    done = assign_writers([tied, tied])
    assert done.payload.tolist()[0] == done.payload.tolist()[1]
    assert len(done.writer) == 2


def test_aliases_on_another_rank_are_one_payload():
    done = assign_writers(
        [claim([whole("a", 4)]), claim([whole("b", 4), whole("a", 4)], alias=[0, 0])]
    )
    assert len(set(done.payload.tolist())) == 1
    assert len(done.writer) == 1


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        (
            [claim([whole("w", 4)]), claim([whole("w", 5)])],
            r"tensor 'w' is float32\[4\] on rank 0 and float32\[5\] on rank 1; nothing was written",
        ),
        (
            [claim([whole("w", 4)]), claim([whole("w", 4, dtype="int8")])],
            r"tensor 'w' is float32\[4\] on rank 0 and int8\[4\] on rank 1",
        ),
        (
            [claim([whole("w", 1)]), claim([whole("w", 1, 1)])],
            r"tensor 'w' is float32\[1\] on rank 0 and float32\[1, 1\] on rank 1",
        ),
        (
            [claim([rows("w", (4, 2), 0, 2)]), claim([rows("w", (4, 2), 1, 4)])],
            r"tensor 'w' float32\[4, 2\]: boxes of ranks 0, 1 overlap at \[1:2, 0:2\]",
        ),
        (
            [claim([rows("w", (4, 2), 0, 1)]), claim(), claim([rows("w", (4, 2), 3, 4)])],
            r"tensor 'w' float32\[4, 2\]: no rank holds \[1:3, 0:2\] "
            r"\(ranks 0, 2 hold other parts of it\)",
        ),
        ([claim([("w", "int8", (4,), [])])], r"'w' int8\[4\]: no rank holds \[0:4\] \(no rank has"),
        (
            [claim([whole("x", 1)]), claim(objects={"x": 1})],
            r"'x' is a tensor on rank 0 and an object on rank 1",
        ),
        (
            [claim(objects={"lr": 0.1}), claim(), claim(objects={"lr": 0.2})],
            r"object 'lr' has different values on ranks 0 and 2",
        ),
    ],
)
def test_contradictions_name_tensor_and_ranks(claims, message):
    with pytest.raises(Conflict, match=message):
        assign_writers(claims)


def test_objects_are_written_by_the_lowest_rank_that_has_them():
    done = assign_writers([claim(objects={"a": 1}), claim(objects={"b": 2, "a": 1})])
    assert done.objects == ("a", "b")
    assert done.object_writer.tolist() == [0, 1]
    assert [names for _, names in done.orders(2)] == [("a",), ("b",)]


def test_a_legacy_duplicate_is_written_last():
    done = assign_writers([claim(objects={"opt.lr": 1}, legacy_duplicates={"opt": ("opt",)})])
    assert done.objects == ("opt.lr",)
    assert done.legacy_duplicates == {"opt": ("opt",)}
    assert done.orders(1)[0][1] == ("opt.lr", "opt")


@pytest.mark.parametrize(
    "other",
    [claim(objects={"opt.more": 2}), claim([whole("opt.t", 2)])],
    ids=["another leaf", "a tensor"],
)
def test_a_container_with_more_leaves_on_another_rank_has_no_legacy_duplicate(other):
    done = assign_writers(
        [claim(objects={"opt.lr": 1}, legacy_duplicates={"opt": ("opt",)}), other]
    )
    assert done.legacy_duplicates == {}


def test_empty_claims_are_valid():
    done = assign_writers([claim(), claim()])
    assert done.tensors.names == ()
    assert [pieces.tolist() for pieces, _ in done.orders(2)] == [[], []]
