"""Values marked as per rank or replicated: stored apart, compared, and restored."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shardkeep as sk
from shardkeep.checkpoint.reader import open_reader
from shardkeep.testing import simulated_ranks
from shardkeep.torch_state.shards import Shards
from support import own


def test_each_rank_gets_its_own_random_state_and_data_position_back(play, tmp_path):
    ends = play(own.resume, str(tmp_path / "ckpt"))
    assert all(end["same"] for end in ends)
    assert len({str(end["drawn"]) for end in ends}) == 4
    assert all(end["unexpected"] == () for end in ends)


def test_the_global_random_generators_of_a_tp_dp_job_are_restored(gloo, tmp_path):
    for end in gloo.run("support.own_gloo:tp_dp", str(tmp_path / "ckpt")):
        assert end == "bit for bit"


def each(rank: int) -> dict:
    return {"a": {"mine": sk.PerRank(rank)}, "b": sk.PerRank([rank]), "c": 5}


@pytest.fixture
def by_four(tmp_path):
    path = str(tmp_path / "ckpt")
    assert (
        simulated_ranks.run(4, own.save, path, {rank: each(rank) for rank in range(4)})
        == ["saved"] * 4
    )
    return path


def test_per_rank_values_on_another_number_of_ranks_are_refused_by_default(by_four):
    for text, refused, state in simulated_ranks.run(2, own.load, by_four, "error"):
        assert text == (
            f"{by_four}: 2 names do not match; nothing was read\n"
            "  a.mine: per rank: 4 ranks saved a value each, 2 ranks load; "
            'per_rank="skip" leaves it as it is, "modulo" takes that of rank % 4, '
            "a function chooses\n"
            "  b: per rank: 4 ranks saved a value each, 2 ranks load; "
            'per_rank="skip" leaves it as it is, "modulo" takes that of rank % 4, '
            "a function chooses"
        )
        assert list(refused) == ["a.mine", "b"]
        assert (state["b"].value, state["c"]) == ("untouched", 0)


def choose(name: str, rank: int, size: int, saved: int) -> int | None:
    return saved - 1 - rank if name == "b" else None


@pytest.mark.parametrize(
    ("size", "policy", "values", "skipped"),
    [
        (2, "skip", [("untouched", "untouched")] * 2, ("a.mine", "b")),
        (6, "modulo", [(r % 4, [r % 4]) for r in range(6)], ()),
        (2, choose, [("untouched", [3]), ("untouched", [2])], ("a.mine",)),
        (2, {"a.*": "skip", "*": "modulo"}, [("untouched", [0]), ("untouched", [1])], ("a.mine",)),
        (4, "error", [(r, [r]) for r in range(4)], ()),
    ],
)
def test_a_policy_assigns_per_rank_values_on_another_number_of_ranks(
    by_four, size, policy, values, skipped
):
    for wanted, (mine, b, c, report) in zip(
        values, simulated_ranks.run(size, own.load, by_four, policy), strict=True
    ):
        assert (mine, b, c) == (*wanted, 5)
        assert report.skipped == skipped
        assert report.unexpected == report.missing == ()


@pytest.mark.parametrize(
    ("policy", "message"),
    [("nearest", "not 'nearest'"), (lambda *_: 4, "per_rank chose rank 4 for 'a.mine': 4 ranks")],
)
def test_an_invalid_policy_is_refused(by_four, policy, message):
    with pytest.raises(ValueError, match=message):
        simulated_ranks.run(2, own.load, by_four, policy)


def test_readers_see_per_rank_values_as_ordinary_entries(by_four):
    for checkpoint in (sk.open(by_four), sk.open(by_four, manifest=False)):
        assert set(checkpoint) == {
            "c", *(f"{name}.rank_{rank}_of_4" for name in ("a.mine", "b") for rank in range(4))
        }  # fmt: skip
        assert checkpoint.tree()["a"]["mine"] == {f"rank_{rank}_of_4": rank for rank in range(4)}


def test_stock_torch_reads_per_rank_values_as_ordinary_entries(by_four):
    import torch.distributed.checkpoint as stock

    state = {"b": {"rank_2_of_4": None}, "a": {"mine": {"rank_0_of_4": None}}}
    stock.load(state, checkpoint_id=by_four)
    assert state == {"b": {"rank_2_of_4": [2]}, "a": {"mine": {"rank_0_of_4": 0}}}


def test_torch_2_3_finds_a_mapping_without_tensors_as_one_object(tmp_path):
    path = str(tmp_path / "ckpt")
    states = {r: {"a": {"b": sk.PerRank({"x": r, "y": {}}), "c": {"d": 1}}} for r in range(2)}
    assert simulated_ranks.run(2, own.save, path, states) == ["saved"] * 2
    index = open_reader(path).index
    assert set(index.legacy_duplicates) == {"a.b.rank_0_of_2", "a.b.rank_1_of_2", "a.c"}
    row = index.objects.names.index("a.b.rank_1_of_2")
    item, length = int(index.objects.item[row]), int(index.objects.length[row])
    data = (Path(path) / index.files[index.objects.file[row]]).read_bytes()[item : item + length]
    assert torch.load(io.BytesIO(data), weights_only=True) == {"x": 1, "y": {}}


def test_only_some_ranks_may_have_a_per_rank_value(tmp_path):
    path = str(tmp_path / "ckpt")
    states = {rank: {"b": sk.PerRank(rank)} if rank % 2 else {"c": 1} for rank in range(4)}
    assert simulated_ranks.run(4, own.save, path, states) == ["saved"] * 4
    assert set(sk.open(path)) == {"c", "b.rank_1_of_4", "b.rank_3_of_4"}
    state = {"b": sk.PerRank(None)}  # rank 0 of 1: another number of ranks than saved
    with pytest.raises(sk.Mismatch, match="b: per rank: 4 ranks saved"):
        sk.load(state, path)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {"b": sk.PerRank(1)},
            {"b": {"rank_0_of_2": 1}},
            "['b'] is PerRank on rank 0, but not marked on rank 1",
        ),
        ({"b": sk.PerRank(1)}, {"b": 1}, "['b'] is PerRank on rank 0, but not marked on rank 1"),
        (
            {"b": sk.PerRank(1)},
            {"b.rank_0_of_2": 1},
            "both be saved under the name 'b.rank_0_of_2'",
        ),
        (
            {"b": sk.PerRank(1), "b.rank_0_of_2": 1},
            {},
            "['b']['rank_0_of_2'] and ['b.rank_0_of_2'] would both be saved under the name",
        ),
        (
            {"b": sk.Replicated(torch.ones(2))},
            {"b": torch.ones(2)},
            "['b'] is Replicated on rank 0, but not marked on rank 1",
        ),
        ({"b": sk.PerRank(sk.Replicated(1))}, {}, "['b'] is Replicated inside the PerRank value"),
        ({"b": (sk.PerRank(1),)}, {}, "object 'b' holds a PerRank inside"),
    ],
)
def test_contradictory_markers_are_refused(tmp_path, first, second, message):
    with pytest.raises(sk.Conflict) as caught:
        simulated_ranks.run(2, two, str(tmp_path / "ckpt"), [first, second])
    assert message in str(caught.value)
    assert not (tmp_path / "ckpt" / ".metadata").exists()


def two(ranks, path, states) -> None:
    sk.save(states[ranks.rank], path, ranks=ranks)


class Odd:
    """An object that can only be pickled."""

    def __init__(self, value: int) -> None:
        self.value = value


def differing(kind: str, rank: int) -> object:
    other = rank in (1, 3)
    if kind == "tensor":
        made = torch.zeros(600_000)
        made[-1] = other
        return made
    if kind == "transposed":
        return torch.arange(6.0).reshape(2, 3).T + other
    if kind == "large object":
        return [*range(10_000), int(other)]
    if kind == "pickled object":
        return {"x": (torch.tensor([float(other)]),)}
    if kind == "nested":
        return {"deep": [torch.ones(2), {"x": float(other)}]}
    return Shards((4, 2), [((rank // 2 * 2, 0), torch.full((2, 2), float(other)))])


@pytest.mark.parametrize(
    ("kind", "what", "groups"),
    [
        ("tensor", "tensor 'a.w' is Replicated, but", "ranks 0, 2 than on ranks 1, 3"),
        ("transposed", "tensor 'a.w'", "ranks 0, 2 than on ranks 1, 3"),
        ("large object", "object 'a.w'", "ranks 0, 2 than on ranks 1, 3"),
        ("pickled object", "object 'a.w.x'", "ranks 0, 2 than on ranks 1, 3"),
        ("nested", "object 'a.w.deep.1.x'", "ranks 0, 2 than on ranks 1, 3"),
        ("sharded", "tensor 'a.w' at [0:2, 0:2]", "rank 0 than on rank 1"),
    ],
)
def test_replicas_that_differ_are_refused(tmp_path, kind, what, groups):
    states = {rank: {"a": {"w": sk.Replicated(differing(kind, rank))}} for rank in range(4)}
    for said in simulated_ranks.run(4, own.save, str(tmp_path / "ckpt"), states):
        assert said.startswith(what)
        assert f"has other content on {groups}; give each" in said
    same = {rank: {"a": {"w": sk.Replicated(differing(kind, rank // 2 * 2))}} for rank in range(4)}
    assert simulated_ranks.run(4, own.save, str(tmp_path / "ckpt"), same) == ["saved"] * 4
    assert sk.open(tmp_path / "ckpt").verify().ok


def test_a_save_does_not_change_a_state_with_markers(tmp_path):
    inner = {"x": sk.PerRank(1), "y": [1, {"z": sk.Replicated(2)}]}
    state = {"a": inner, "b": [3]}
    sk.save(state, tmp_path / "ckpt")
    assert state == {"a": inner, "b": [3]}
    assert inner["y"][1]["z"].value == 2
    state["a"]["y"][0], state["b"][0] = 0, 0
    sk.load(state, tmp_path / "ckpt")
    assert (inner["y"][0], state["b"], inner["x"].value) == (1, [3], 1)
    assert state["a"] is inner
