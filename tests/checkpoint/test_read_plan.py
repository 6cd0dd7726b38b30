"""Reads that need a cast go through a small buffer in rounds, and are verified."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import torch.distributed.checkpoint as dcp

import shardkeep as sk
from shardkeep.checkpoint import read_plan
from shardkeep.engine import load
from shardkeep.errors import Damaged, Mismatch
from shardkeep.stores import MemoryStore

MIB = 1 << 20


def state() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(5)
    return {
        "large": torch.randn(700, 1100, generator=made),  # 3 MiB
        "row": torch.randn(1, 500_000, generator=made),
        "small": torch.randn(7, generator=made),
        "scalar": torch.randn((), generator=made),
        "empty": torch.zeros(0, 4),
        "ints": torch.arange(300_000),
    }


def template(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(one, dtype=dtype) for name, one in state().items()}


@pytest.fixture
def planned(monkeypatch):
    """Return a list that collects the plans of loads."""
    made, plan = [], load._plan

    def seen(*args):
        made.append(plan(*args))
        return made[-1]

    monkeypatch.setattr(load, "_plan", seen)
    return made


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("threads", ["1", "3"])
def test_a_cast_equals_that_of_the_whole_tensor_under_any_budget(
    monkeypatch, planned, verify, threads
):
    monkeypatch.setenv("SHARDKEEP_READ_THREADS", threads)
    store, saved = MemoryStore(), state()
    sk.save(saved, store)
    for budget in (MIB, 4 * MIB, 64 * MIB):
        mine, reported = template(), []
        mine["large"] = torch.zeros(1100, 700, dtype=torch.float16).t()  # not in C order
        report = sk.load(
            mine,
            store,
            dtype="cast",
            verify=verify,
            max_host_memory=budget,
            progress=lambda *what, reported=reported: reported.append(what),
        )
        for name, one in saved.items():
            assert torch.equal(mine[name], one.to(mine[name].dtype)), name
        assert set(report.cast) == set(saved) and report.resharded == ()
        assert reported[-1][1] == reported[-1][2] == max(done for _, done, _ in reported)
    rounds = [len(read_plan.rounds) for read_plan in planned]
    assert rounds[0] > rounds[1] > rounds[2] == 1
    assert all(
        part.into.base is not None and not read_plan.copies
        for read_plan in planned
        for one in read_plan.rounds
        for part in one.copies
    )


def test_shards_that_cross_the_saved_ones_are_read():
    saved = torch.arange(1200.0 * 900).reshape(1200, 900)
    store = MemoryStore()
    rows = [((at, 0), saved[at : at + 300]) for at in range(0, 1200, 300)]
    sk.save({"t": sk.Shards((1200, 900), rows)}, store)
    for verify in (True, False):
        column = torch.zeros(1200, 400, dtype=torch.float64)
        mine = {"t": sk.Shards((1200, 900), [((0, 250), column)])}
        report = sk.load(mine, store, dtype="cast", max_host_memory=MIB, verify=verify)
        assert torch.equal(column, saved[:, 250:650].double())
        assert report.resharded == ("t",)


def test_tensors_that_require_grad_or_are_conjugated_are_cast_in_place():
    store = MemoryStore()
    sk.save({"w": torch.randn(5), "z": torch.randn(4, dtype=torch.complex64)}, store)
    with torch.inference_mode():
        z = torch.zeros(4, dtype=torch.complex128)
    w = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    lazy = torch.zeros(4, dtype=torch.complex64)
    sk.load({"w": w, "z": z}, store, dtype="cast")
    sk.load({"w": w, "z": lazy.conj()}, store, dtype="cast")
    found = sk.open(store)
    assert w.requires_grad and w.is_leaf
    assert np.array_equal(w.detach().numpy(), found.read("w").astype(np.float64))
    assert np.array_equal(z.numpy(), found.read("z").astype(np.complex128))
    assert np.array_equal(lazy.numpy(), found.read("z").conj())


def test_a_stock_checkpoint_is_checked_across_rounds(tmp_path, planned):
    """Each payload has one CRC-32, which covers bytes of several rounds."""
    saved = state()
    dcp.save(saved, checkpoint_id=tmp_path)
    mine = template()
    report = sk.load(mine, tmp_path, dtype="cast", max_host_memory=MIB)
    assert len(planned[0].rounds) > 3
    assert report.unchecked == ()
    assert torch.equal(mine["large"], saved["large"].double())
    (file,) = tmp_path.glob("*.distcp")
    content = bytearray(file.read_bytes())
    place = content.index(saved["large"].numpy().tobytes()[-64:])
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(Damaged, match=r"'large'.*CRC-32"):
        sk.load(template(), tmp_path, dtype="cast", max_host_memory=MIB)


def test_a_cast_that_torch_refuses_raises_mismatch(monkeypatch):
    store = MemoryStore()
    sk.save({"t": torch.ones(3)}, store)
    real = torch.Tensor.copy_

    def refuse(self, other, *more):
        if self.dtype == torch.float64:
            raise RuntimeError("no such cast")
        return real(self, other, *more)

    monkeypatch.setattr(torch.Tensor, "copy_", refuse)
    with pytest.raises(
        Mismatch, match=r"torch cannot cast float32 to torch\.float64: no such cast"
    ):
        sk.load({"t": torch.zeros(3, dtype=torch.float64)}, store, dtype="cast")


def test_reads_into_tensors_of_the_saved_dtype_need_no_rounds(planned):
    store, saved = MemoryStore(), state()
    sk.save(saved, store)
    mine = {name: torch.zeros_like(one) for name, one in saved.items()}
    sk.load(mine, store)
    assert all(torch.equal(mine[name], one) for name, one in saved.items())
    assert isinstance(planned[0], read_plan.ReadPlan)
    assert planned[0].rounds == [] and planned[0].room == 0
