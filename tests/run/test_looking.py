"""Inspecting and pruning a run without torch."""

from __future__ import annotations

import numpy as np
import pytest

import shardkeep as sk
from shardkeep.checkpoint import commit
from shardkeep.format import values
from shardkeep.stores import LocalStore
from shardkeep.types import Chunks, Index, Objects, Structure, Tensors


def none(*shape: int, dtype: type = np.int64) -> np.ndarray:
    return np.zeros(shape, dtype)


def save(path, step: int, **metrics: float) -> None:
    """Write a step that holds one object."""
    store, save_id = LocalStore(path / f"step_{step}"), commit.new_id()
    file = commit.data_file(0, 0, save_id)
    with store.open_writer(file) as sink:
        sink.write(b"12345")
    index = Index(
        files=(file,),
        tensors=Tensors((), none(0, dtype=np.uint8), none(0, dtype=np.uint8), none(0, 0)),
        chunks=Chunks(
            none(0), none(0, 0), none(0, 0), none(0, dtype=np.int32), none(0), none(0), none(0),
            none(0, dtype=np.int16), none(1), none(0, dtype=np.uint32),
        ),
        objects=Objects(
            ("step",), none(1, dtype=np.int32), none(1), np.array([5]), none(1, dtype=np.int16),
            np.array([-1]), {"step": values.encode(step)},
        ),
        structure=Structure({"step": ("step",)}, {(): "dict"}),
    )  # fmt: skip
    commit.publish(store, save_id, index, {"save_id": save_id, "metrics": metrics})


def test_a_run_can_be_inspected_and_pruned_without_torch(tmp_path):
    for step, loss in {1: 0.1, 2: 0.5, 3: 0.3, 4: 0.2}.items():
        save(tmp_path, step, loss=loss)
    m = sk.Manager(tmp_path, keep=sk.KeepLast(1) | sk.KeepBest("loss"))
    assert m.steps() == [1, 2, 3, 4] and m.latest() == 4
    assert m.best("loss") == 1 and m.best("loss", "max") == 2
    assert m.metrics(3) == {"loss": 0.3}
    assert sk.open(m.path(3))["step"].value == 3
    assert m.prune() == (2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_4"]
    m.close()


@pytest.mark.parametrize(
    "metrics",
    [
        {"loss": float("nan")},
        {"loss": "0.1"},
        {"loss": [0.1]},
        {"loss": None},
        {"loss": True},
        {"loss": 2**5000},
        {3: 0.1},
        [0.1],
        "loss",
        None,
    ],
)
def test_invalid_metrics_in_a_commit_record_are_ignored(tmp_path, metrics, monkeypatch):
    from shardkeep.run import steps

    save(tmp_path, 1, loss=0.1)
    monkeypatch.setattr(steps, "read_header", lambda *_, **__: {"metrics": metrics})
    assert sk.Manager(tmp_path).best("loss") is None
