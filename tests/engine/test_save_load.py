"""Any number of ranks loads, bit for bit, what any other number saved."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from hypothesis import given, settings
from hypothesis import strategies as st

import shardkeep as sk
from shardkeep.engine import save_queue
from shardkeep.testing import simulated_ranks
from shardkeep.torch_state.placements import Replicate, Shard, StridedShard
from shardkeep.types import Box
from support import scenarios
from support.scenarios import equal, part, values

DTYPES = "float32 bfloat16 int8 bool complex64 float8_e4m3fn uint16 complex128".split()


@st.composite
def layouts(draw, ndim: int):
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    placements = []
    for _ in mesh:
        kinds = [st.just(Replicate())]
        if ndim:
            dim = st.integers(0, ndim - 1)
            kinds += [dim.map(Shard), st.builds(StridedShard, dim, st.integers(1, 3))]
        placements.append(draw(st.one_of(kinds)))
    return mesh, tuple(placements)


@st.composite
def tensors(draw):
    made = []
    for i in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        dtype = draw(st.sampled_from(DTYPES))
        made.append((f"t{i}", shape, dtype, draw(layouts(len(shape))), draw(layouts(len(shape)))))
    return made


def world(layout_of, made) -> int:
    sizes = [1]
    for tensor in made:
        mesh = tensor[layout_of][0]
        size = 1
        for n in mesh:
            size *= n
        sizes.append(size)
    return max(sizes)


@settings(max_examples=40)
@given(made=tensors())
def test_any_layout_loads_into_any_other(tmp_path_factory, made):
    path = str(tmp_path_factory.mktemp("reshard") / "ckpt")
    simulated_ranks.run(world(3, made), scenarios.save_layouts, path, made)
    assert simulated_ranks.run(world(4, made), scenarios.load_layouts, path, made) == [[]] * world(
        4, made
    )
    checkpoint = sk.open(path)
    assert checkpoint.verify().ok
    for name, shape, dtype, _, _ in made:
        array = checkpoint.read(name)
        assert array.shape == shape
        assert array.tobytes() == scenarios.bits(values(name, shape, getattr(torch, dtype)))


def test_every_kind_of_value_is_loaded_as_it_was_saved(play, tmp_path):
    reports = play(scenarios.round_trip, str(tmp_path / "ckpt"))
    assert all(report["missing"] == () for report in reports)
    assert sum(report["written"] for report in reports) == reports[0]["nbytes"]
    others = [name for name in reports[1]["unexpected"] if name.startswith("only.")]
    assert sorted({name.split(".")[1] for name in others}) == ["0", "2", "3"]


def test_one_process_needs_no_process_group(tmp_path):
    state = scenarios.job_state(0, 1)
    report = sk.save(state, tmp_path / "ckpt")
    loaded = scenarios.blank(state)
    loaded["empty"] = state["empty"]
    sk.load(loaded, tmp_path / "ckpt")
    assert equal(loaded, state)
    assert report.tensors == 11


def test_the_loaded_tree_equals_the_saved_one(tmp_path):
    state = scenarios.job_state(0, 1)
    sk.save(state, tmp_path / "ckpt")
    tree = sk.open(tmp_path / "ckpt").tree()
    assert list(tree) == list(state)
    assert tree["empty"] == {"dict": {}, "list": [], "tuple": ()}
    assert tree[True] == {None: 1.5, (1, "a"): b"bytes", 2.5: {3: "deep"}}
    assert list(tree["optim"]["state"]) == [0, 1]
    assert tree["optim"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert tree["only"][0]["note"] == "rank 0"


def test_tied_tensors_are_stored_once_and_both_names_load(tmp_path):
    weight = values("w", (300, 200), torch.float32)
    report = sk.save({"embed": weight, "head": weight, "also": weight.T}, tmp_path / "ckpt")
    assert report.nbytes < 2 * weight.nbytes + 3 * 4096
    checkpoint = sk.open(tmp_path / "ckpt")
    assert checkpoint["embed"].chunks == checkpoint["head"].chunks
    assert checkpoint["also"].chunks != checkpoint["head"].chunks
    loaded = {"embed": torch.zeros(300, 200), "head": torch.zeros(300, 200)}
    sk.load(loaded, tmp_path / "ckpt")
    assert equal(loaded, {"embed": weight, "head": weight})


@pytest.mark.parametrize(
    ("states", "kind", "message"),
    [
        (
            [{"w": torch.zeros(4)}, {"w": torch.zeros(5)}],
            "Conflict",
            "tensor 'w' is float32[4] on rank 0 and float32[5] on rank 1; nothing was written",
        ),
        (
            [{"w": part((4, 4), Box((0, 0), (2, 4)))}, {"w": part((4, 4), Box((1, 0), (3, 4)))}],
            "Conflict",
            "tensor 'w' float32[4, 4]: boxes of ranks 0, 1 overlap at [1:2, 0:4]; "
            "nothing was written",
        ),
        (
            [{"w": part((4, 4), Box((0, 0), (2, 4)))}, {"w": part((4, 4), Box((2, 0), (2, 3)))}],
            "Conflict",
            "tensor 'w' float32[4, 4]: no rank holds [2:4, 3:4] "
            "(ranks 0, 1 hold other parts of it); nothing was written",
        ),
        (
            [{"w": torch.zeros(4)}, {"w": 3}],
            "Conflict",
            "'w' is a tensor on rank 0 and an object on rank 1; nothing was written",
        ),
        (
            [{"lr": 1}, {"lr": 2}],
            "Conflict",
            "object 'lr' has different values on ranks 0 and 1; give each rank's its own name, "
            "or make them equal; nothing was written",
        ),
    ],
)
def test_contradictions_are_refused_on_every_rank(play, tmp_path, states, kind, message):
    assert play(scenarios.refused, str(tmp_path), states, size=2) == [(kind, message)] * 2
    assert not list(tmp_path.iterdir())


def test_names_that_collide_are_refused(tmp_path):
    with pytest.raises(sk.Conflict, match=r"\['0'\].*\[0\]|\[0\].*\['0'\]"):
        sk.save({0: torch.zeros(1), "0": torch.zeros(1)}, tmp_path)
    with pytest.raises(sk.Conflict, match=r"a\.b"):
        sk.save({"a.b": 1, "a": {"b": 2}}, tmp_path)


def test_an_existing_checkpoint_is_not_overwritten_by_default(play, tmp_path):
    states = [{"w": torch.ones(3)}] * 2
    play(scenarios.save_state, str(tmp_path), states, size=2)
    kind, message = play(scenarios.refused, str(tmp_path), states, size=2)[1]
    assert kind == "AlreadyExists"
    assert message == f"{tmp_path} already holds a checkpoint; pass overwrite=True to replace it"


def test_overwriting_leaves_no_stale_file(play, tmp_path):
    four = [{"w": part((4, 4), Box((r, 0), (1, 4))), f"r{r}": torch.ones(2)} for r in range(4)]
    play(scenarios.save_state, str(tmp_path), four, size=4)
    ids = simulated_ranks.run(
        1, lambda ranks: scenarios.save_state(ranks, str(tmp_path), [{"x": 1}], overwrite=True)
    )
    names = {file.name for file in tmp_path.iterdir()}
    assert len(names) == 3
    assert all(ids[0] in name or name == ".metadata" for name in names)
    assert list(sk.open(tmp_path)) == ["x"]


class Holder(torch.nn.Module):
    """A module with a tied parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(3, 3, bias=False)
        self.b = torch.nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight


def test_modules_and_optimizers_are_saved_by_their_state(tmp_path):
    torch.manual_seed(1)
    model = Holder()
    optim = torch.optim.AdamW(model.parameters())
    model.a(torch.ones(3)).sum().backward()
    optim.step()
    sk.save({"model": model, "optim": optim, "step": 1}, tmp_path)
    other = Holder()
    later = torch.optim.AdamW(other.parameters(), lr=7.0)
    other.a(torch.ones(3)).sum().backward()
    later.step()
    state = {"model": other, "optim": later, "step": None}
    sk.load(state, tmp_path)
    assert scenarios.same(other.b.weight, model.b.weight)
    assert later.param_groups[0]["lr"] == optim.param_groups[0]["lr"]
    assert equal(later.state_dict(), optim.state_dict())
    assert state["step"] == 1


def test_all_mismatches_are_listed_before_anything_is_read(tmp_path):
    sk.save({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(4), "d": 1}, tmp_path)
    template = {
        "a": torch.zeros(2),
        "b": torch.zeros(5),
        "c": torch.zeros(4, dtype=torch.float64),
        "e": torch.zeros(1),
        "f": 0,
        "d": torch.zeros(1),
    }
    with pytest.raises(sk.Mismatch) as caught:
        sk.load(template, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: 5 names do not match; nothing was read\n"
        "  e: missing: not in the checkpoint\n"
        "  f: missing: not in the checkpoint\n"
        "  b: shape: [3] in the checkpoint, [5] in the template\n"
        "  d: kind: int in the checkpoint, a tensor in the template\n"
        "  c: dtype: float32 in the checkpoint, float64 in the template"
    )
    assert set(caught.value.report.refused) == {"b", "c", "d", "e", "f"}
    assert not template["a"].any()


def test_patterns_relax_strictness_and_dtypes(tmp_path):
    sk.save({"model": {"w": torch.arange(4.0)}, "old": 1}, tmp_path)
    template = {"model": {"w": torch.zeros(4, dtype=torch.float64), "new": torch.ones(1)}}
    report = sk.load(template, tmp_path, strict={"model.new": False}, dtype={"model.*": "upcast"})
    assert report.missing == ("model.new",)
    assert report.unexpected == ("old",)
    assert report.cast == {"model.w": ("float32", "float64")}
    assert template["model"]["w"].tolist() == [0, 1, 2, 3]
    half = {"model": {"w": torch.zeros(4, dtype=torch.float16)}}
    with pytest.raises(sk.Mismatch, match="dtype: float32 in the checkpoint, float16 in the"):
        sk.load(half, tmp_path, dtype="upcast")
    sk.load(half, tmp_path, dtype="cast")
    assert half["model"]["w"].tolist() == [0, 1, 2, 3]


class Secret:
    """A user's class."""

    def __init__(self, value: int) -> None:
        self.value = value


def test_objects_of_unknown_classes_need_trust(tmp_path):
    sk.save({"s": Secret(5)}, tmp_path)
    kind = f"{Secret.__module__}.Secret"
    assert repr(sk.open(tmp_path)["s"].value) == f"<Opaque {kind}>"
    state = {"s": None}
    with pytest.raises(sk.Untrusted, match=rf'pass trust=\["{kind}"\]'):
        sk.load(state, tmp_path)
    sk.load(state, tmp_path, trust=[kind])
    assert state["s"].value == 5


def test_only_the_needed_bytes_are_read(tmp_path):
    sk.save({"w": values("w", (4096, 1024), torch.float32)}, tmp_path)
    part_of = sk.Shards((4096, 1024), [((1024, 0), torch.zeros(512, 1024))])
    report = sk.load({"w": part_of}, tmp_path)
    assert report.nbytes == 512 * 1024 * 4
    assert report.read <= report.nbytes + 2 * 256 * 1024
    assert report.resharded == ("w",)


def keep_the_lowest(ranks, path):
    state = {"lr": ranks.rank, "same": [1], "w": torch.ones(2)}
    sk.save(state, path, ranks=ranks, require_identical_objects=False)


def test_a_warning_names_objects_that_differ_between_ranks(tmp_path):
    with pytest.warns(UserWarning) as said:
        simulated_ranks.run(3, keep_the_lowest, tmp_path)
    assert [str(one.message) for one in said] == [
        "ranks have different values of 'lr': the lowest rank's is saved; "
        "give each rank's its own name"
    ]
    assert sk.open(tmp_path).read("lr") == 0


def save_in_files(ranks, path, files):
    state = {f"w{i}": torch.full((i + 1,), float(i)) for i in range(5)}
    state |= {"opt": {"lr": 0.5, "groups": [1]}, f"own{ranks.rank}": ranks.rank}
    sk.save(state, path, ranks=ranks, files=files)


@pytest.mark.parametrize(("files", "each"), [(None, 1), (1, 1), (3, 3), (9, 9)])
def test_the_number_of_files_of_each_rank(tmp_path, files, each):
    simulated_ranks.run(2, save_in_files, tmp_path, files)
    found = [path.name for path in tmp_path.glob("*.distcp")]
    assert all(sum(name.startswith(f"__{rank}_") for name in found) == each for rank in (0, 1))
    report = sk.open(tmp_path).verify()
    assert report.ok
    loaded = {f"w{i}": torch.zeros(i + 1) for i in range(5)}
    sk.load(loaded, tmp_path)
    assert all((loaded[f"w{i}"] == i).all() for i in range(5))


def save_replicas(ranks, path, balance_replicas):
    sk.save(
        {f"w{i}": torch.ones(64) for i in range(8)},
        path,
        ranks=ranks,
        balance_replicas=balance_replicas,
    )


@pytest.mark.parametrize(("balance_replicas", "ranks"), [(True, {0, 1, 2}), (False, {0})])
def test_which_ranks_write_replicas(tmp_path, balance_replicas, ranks):
    simulated_ranks.run(3, save_replicas, tmp_path, balance_replicas)
    assert {int(path.name.split("_")[2]) for path in tmp_path.glob("*.distcp")} == ranks


@pytest.mark.parametrize(("platform", "asked"), [("linux", 1), ("darwin", 0)])
def test_the_priority_of_a_thread_is_lowered_on_linux_only(monkeypatch, platform, asked):
    calls = []
    monkeypatch.setattr(save_queue.os, "setpriority", lambda *of: calls.append(of), raising=False)
    monkeypatch.setattr(save_queue.sys, "platform", platform)
    save_queue._lower_priority()
    assert calls == [(os.PRIO_PROCESS, threading.get_native_id(), 19)] * asked


MODULE = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("call", [sk.save, sk.async_save, sk.load])
@pytest.mark.parametrize(
    ("given", "options", "kind", "message"),
    [
        (torch.ones(2), {}, TypeError, "a state is a mapping of names to values, not a Tensor"),
        (MODULE, {}, TypeError, "a state is a mapping of names to values, not a Linear"),
        ([("a", 1)], {}, TypeError, "a state is a mapping of names to values, not a list"),
        ({}, {"files": 0}, ValueError, "files must be at least 1, not 0"),
        ({}, {"files": -3}, ValueError, "files must be at least 1, not -3"),
        ({}, {"max_host_memory": "64MB"}, ValueError, "a number of bytes, 1 or more, not '64MB'"),
        ({}, {"max_host_memory": 0}, ValueError, "max_host_memory must be .* not 0"),
        (
            {},
            {"max_host_memory": -1},
            ValueError,
            "max_host_memory must be a number of bytes, .* not -1",
        ),
        ({}, {"max_host_memory": 2e9}, ValueError, "a number of bytes, .* not 2000000000.0"),
        ({}, {"max_host_memory": True}, ValueError, "a number of bytes, .* not True"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_is_created(
    tmp_path, call, given, options, kind, message
):
    if call is sk.load:
        sk.save({"a": 1}, tmp_path / "x")
        if "files" in options:
            pytest.skip("no argument of load")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=message):
        call(given, tmp_path / "x", **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_any_positive_number_of_bytes_is_a_valid_budget(tmp_path):
    mine = {"w": torch.arange(400_000.0)}
    for budget in (1, 1000, 1 << 20, np.int64(3 << 20), 1 << 40):
        sk.save(mine, tmp_path, overwrite=True, max_host_memory=budget)
        found = {"w": torch.zeros(400_000)}
        sk.load(found, tmp_path, max_host_memory=budget)
        assert equal(found["w"], mine["w"])
