"""`sk.open` and the mapping that it returns: accessors, closing, and the cost of reads."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import torch.distributed.checkpoint as stock

import shardkeep as sk
from shardkeep.checkpoint import reader
from shardkeep.settings import BLOCK
from shardkeep.stores import LocalStore


@pytest.fixture(scope="module")
def state():
    return {
        "model": {"w": torch.arange(12.0).reshape(3, 4), "scalar": torch.tensor(7.0)},
        "empty": torch.zeros(0, 4),
        "epoch": 3,
        "betas": (0.9, 0.99),
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("run") / "step_1"
    sk.save(state, path)
    return path


def test_typed_accessors_return_tensors_and_values(path):
    with sk.open(path) as checkpoint:
        info = checkpoint.tensor("model.w")
        assert (info.dtype.name, info.shape, info.nbytes) == ("float32", (3, 4), 48)
        assert isinstance(info, sk.TensorInfo)
        assert isinstance(checkpoint["epoch"], sk.ObjectInfo)
        assert checkpoint.value("epoch") == checkpoint.read("epoch") == 3
        assert checkpoint.value("betas") == (0.9, 0.99)
        assert [checkpoint.is_tensor(name) for name in ("model.w", "epoch")] == [True, False]


def test_typed_accessors_refuse_names_of_the_other_kind_and_unknown_ones(path):
    checkpoint = sk.open(path)
    with pytest.raises(KeyError, match="'epoch' is an object, not a tensor: use value"):
        checkpoint.tensor("epoch")
    with pytest.raises(KeyError, match=r"'model\.w' is a tensor, not an object: use read"):
        checkpoint.value("model.w")
    for call in (checkpoint.tensor, checkpoint.value, checkpoint.read, checkpoint.is_tensor):
        with pytest.raises(KeyError, match="has no tensor or object named 'x'"):
            call("x")


def test_only_what_users_need_is_public(path):
    mapping = {"get", "items", "keys", "values"}
    public = {name for name in dir(sk.open(path)) if not name.startswith("_")} - mapping
    assert public == set("url kind is_tensor tensor value read tree verify close".split())


def test_repr_is_one_useful_line(path):
    checkpoint = sk.open(path)
    assert repr(checkpoint) == (f"<Checkpoint {path} (shardkeep): 3 tensors, 52 B, 2 objects>")
    checkpoint.close()
    assert repr(checkpoint) == f"<Checkpoint {path}: closed>"


def test_using_a_closed_checkpoint_raises(path):
    with sk.open(path) as checkpoint:
        checkpoint.read("model.w")
    checkpoint.close()
    for use in (
        lambda: checkpoint.read("model.w"),
        lambda: checkpoint["model.w"],
        lambda: len(checkpoint),
        lambda: checkpoint.kind,
        lambda: "epoch" in checkpoint,
    ):
        with pytest.raises(ValueError, match=r"the checkpoint .*step_1 is closed; open it again"):
            use()
    assert checkpoint.url == str(path)


@pytest.mark.parametrize("given", ["path", "store"])
def test_closing_closes_the_store_that_open_made_and_no_other(path, given, monkeypatch):
    closed = []
    monkeypatch.setattr(LocalStore, "close", lambda self: closed.append(self.url))
    with sk.open(path if given == "path" else LocalStore(path)):
        pass
    assert closed == ([str(path)] if given == "path" else [])


@pytest.fixture
def counted(monkeypatch):
    """Count plans, parallel reads, checks of coverage, and reads of the store."""
    counts = dict.fromkeys(("plan", "read_copies", "coverage", "read"), 0)

    def count(owner, name, key):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            counts[key] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    count(reader.read_plan, "plan", "plan")
    count(reader, "read_copies", "read_copies")
    count(reader, "coverage", "coverage")
    count(LocalStore, "get_range", "read")
    return counts


@pytest.mark.parametrize("kind", ["shardkeep", "dcp"])
def test_a_single_small_read_is_one_read_of_the_store(tmp_path, counted, kind):
    state = {f"t{i}": torch.arange(64.0 + i).reshape(1, -1) for i in range(40)}
    if kind == "shardkeep":
        sk.save(state, tmp_path)
    else:
        stock.save(state, checkpoint_id=tmp_path, no_dist=True)
    checkpoint = sk.open(tmp_path)
    for name, tensor in state.items():  # The first read of a tensor may read its item's header.
        assert np.array_equal(checkpoint.read(name), tensor.numpy())
    for key in counted:
        counted[key] = 0
    for name, tensor in state.items():
        assert np.array_equal(checkpoint.read(name), tensor.numpy())
        row = checkpoint.read(name, sk.Box((0, 3), (1, 50)))
        assert np.array_equal(row, tensor.numpy()[:, 3:53])
    assert counted == {"plan": 0, "read_copies": 0, "coverage": 0, "read": 2 * len(state)}


def test_chunks_of_a_tensor_are_checked_to_cover_it_once(tmp_path, counted):
    whole = torch.arange(80.0).reshape(8, 10)
    parts = [((0, 0), whole[:3]), ((3, 0), whole[3:5]), ((5, 0), whole[5:])]
    sk.save({"w": sk.Shards((8, 10), parts)}, tmp_path)
    checkpoint = sk.open(tmp_path)
    for rows in ((0, 8), (2, 3), (4, 1), (0, 8), (7, 1), (3, 0)):
        box = sk.Box((rows[0], 1), (rows[1], 7))
        want = whole[rows[0] : sum(rows), 1:8].numpy()
        assert np.array_equal(checkpoint.read("w", box), want)
    assert counted["coverage"] == 1
    assert counted["plan"] == 0


def test_scalars_and_empty_tensors_are_read(path):
    checkpoint = sk.open(path)
    assert checkpoint.read("model.scalar").item() == 7.0
    assert checkpoint.read("empty").shape == (0, 4)
    assert checkpoint.read("model.w", sk.Box((1, 0), (0, 4))).shape == (0, 4)


def test_a_flipped_bit_of_a_small_part_names_the_block(tmp_path):
    element = BLOCK // 4 + 1000  # in the second block
    sk.save({"w": torch.arange(BLOCK / 2)}, tmp_path)
    opened = reader.open_reader(tmp_path)
    (row,) = opened.chunk_rows("w")
    first, _ = opened.locations.locate([row])[row].payload
    (data,) = tmp_path.glob("*.distcp")
    raw = bytearray(data.read_bytes())
    raw[first + 4 * element] ^= 1
    data.write_bytes(raw)
    checkpoint = sk.open(tmp_path)
    box = sk.Box((element,), (2,))
    with pytest.raises(sk.Damaged, match=rf"{data.name}, 'w', block 1: ") as caught:
        checkpoint.read("w", box)
    assert (caught.value.file, caught.value.name) == (data.name, "w")
    assert checkpoint.read("w", box, verify=False).shape == (2,)
    assert checkpoint.read("w", sk.Box((0,), (10,))).tolist() == list(range(10))
