"""Real ranks load in one layout, bit for bit, what they saved in another one."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.gloo]

from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import shardkeep as sk
from support import jobs, layouts


@pytest.fixture(scope="module")
def saved(gloo, tmp_path_factory):
    """Return a function (layout, ranks) -> path of a checkpoint, its leaves, results by rank."""
    known = {}

    def make(layout: str, size: int):
        if (layout, size) not in known:
            path = str(tmp_path_factory.mktemp(layout) / "ckpt")
            results = gloo.run(jobs.save, path, layout, size=size)
            known[layout, size] = path, results[0]["leaves"], results
        return known[layout, size]

    return make


def is_tensor(leaf) -> bool:
    return isinstance(leaf, tuple) and isinstance(leaf[-1], bytes)


def as_numpy(checkpoint) -> dict:
    """Return the leaves of an opened checkpoint, in the form of `jobs.leaves`."""
    found = {}
    for name in checkpoint:
        value = checkpoint.read(name)
        if checkpoint.is_tensor(name):
            dtype, shape = checkpoint.tensor(name).dtype, checkpoint.tensor(name).shape
            value = (f"torch.{dtype}", shape, value.tobytes())
        found[name] = value
    return found


@pytest.mark.parametrize(
    ("layout", "size", "target", "target_size"),
    [
        ("fsdp", 4, "fsdp", 2),
        ("fsdp", 4, "fsdp", 1),
        ("tp", 4, "tp", 2),
        ("fsdp_tp", 4, "fsdp", 4),
        ("fsdp_tp", 4, "plain", 1),
        ("hsdp", 4, "fsdp", 2),
        ("ddp", 4, "plain", 1),
        ("fsdp", 4, "fsdp_tp", 4),
        ("fsdp_tp", 4, "hsdp", 4),
        ("plain", 1, "ddp", 2),
    ],
)
def test_a_job_resumes_in_another_layout(gloo, saved, layout, size, target, target_size):
    path, expected, _ = saved(layout, size)
    with_stock = target != "fsdp_tp"  # stock torch reads a strided shard as one box
    for result in gloo.run(jobs.load, path, target, with_stock, size=target_size):
        assert result["ours"] == expected
        assert result["missing"] == ()
        assert result["unexpected"] == ()
        weights = {name: leaf for name, leaf in expected.items() if name.startswith("model.")}
        assert result["in place"] == weights
        if with_stock:
            assert result["stock"] == expected


@pytest.mark.parametrize(
    ("layout", "size"),
    [("fsdp", 4), ("tp", 4), ("fsdp_tp", 4), ("hsdp", 4), ("ddp", 4), ("plain", 1)],
)
def test_the_reader_without_torch_reads_the_same(saved, layout, size):
    path, expected, _ = saved(layout, size)
    checkpoint = sk.open(path)
    assert as_numpy(checkpoint) == expected
    assert jobs.leaves_of_tree(checkpoint) == expected
    report = checkpoint.verify()
    assert report.ok
    assert not report.unchecked
    assert as_numpy(sk.open(path, manifest=False)) == expected


def test_replicas_are_written_once_by_different_ranks(saved):
    _, one, _ = saved("plain", 1)
    for layout in ("ddp", "hsdp", "fsdp"):
        _, expected, results = saved(layout, 4)
        written = [result["written"] for result in results]
        assert sum(written) == results[0]["nbytes"]
        assert min(written) > 0
        payload = sum(len(leaf[2]) for leaf in expected.values() if is_tensor(leaf))
        tied = len(expected["model.head.weight"][2])
        assert payload - tied <= sum(written)
    assert set(one) == set(expected)


def test_stock_torch_converts_it_to_one_file(saved, tmp_path):
    path, expected, _ = saved("fsdp_tp", 4)
    dcp_to_torch_save(path, tmp_path / "one.pt")
    whole = torch.load(tmp_path / "one.pt", weights_only=False)
    assert jobs.leaves(whole) == expected


def test_a_fresh_optimizer_gets_its_state(gloo, tmp_path):
    for loaded in gloo.run(jobs.resume, str(tmp_path), size=2):
        assert "optim.state.0.exp_avg" in loaded
        assert "optim.state.0.step" in loaded


def test_any_placements_load_into_any_other(gloo, tmp_path):
    results = gloo.run(layouts.reshard_many, str(tmp_path), 11, 8, 40, limit=100)
    assert [result["wrong"] for result in results] == [[]] * 4
    assert results[0]["cases"] >= 300
    assert results[0]["uneven"] > 100
    assert results[0]["outside"] > 30


def test_other_kinds_of_tensors_and_values(gloo, tmp_path):
    assert gloo.run(layouts.others, str(tmp_path)) == ["fine"] * 4
    for name in ("sharded", "subclass", "some", "a", "b"):
        report = sk.open(tmp_path / name).verify()
        assert report.ok
        assert not report.unchecked
