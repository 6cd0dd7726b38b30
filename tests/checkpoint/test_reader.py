"""Opening and reading checkpoints of stock torch, in addition to the golden tests."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import torch.distributed.checkpoint as stock

import shardkeep as sk
from support.scenarios import bits, same, values


def saved(path, state, **options):
    writer = stock.FileSystemWriter(path, **options)
    stock.save(state, storage_writer=writer, no_dist=True)
    return sk.open(path)


@pytest.mark.parametrize("zstd", [False, True])
def test_conjugated_and_negated_elements(tmp_path, zstd):
    from torch.distributed.checkpoint._extension import ZStandard

    z = values("z", (5, 4), torch.float32).nan_to_num(1.0, 2.0, 3.0)
    z = torch.view_as_complex(z.reshape(5, 2, 2))
    state = {"conj": z.conj(), "neg": z.conj().imag, "transposed": z.conj().T}
    options = {"_extensions": [ZStandard()]} if zstd else {}
    checkpoint = saved(tmp_path, state, **options)
    for name, tensor in state.items():
        want = tensor.resolve_conj().resolve_neg().numpy()
        assert np.array_equal(checkpoint.read(name), want), name
    template = {name: torch.zeros_like(tensor.resolve_conj()) for name, tensor in state.items()}
    sk.load(template, tmp_path)
    assert all(torch.equal(template[name], tensor) for name, tensor in state.items())


def test_boxes_of_tensors_stored_transposed(tmp_path):
    whole = values("w", (30, 20), torch.int32)
    checkpoint = saved(tmp_path, {"w": whole.T})
    part = checkpoint.read("w", sk.Box((3, 7), (10, 11)))
    assert part.tobytes() == bits(whole.T[3:13, 7:18])


def test_invalid_boxes_and_unknown_names_raise(tmp_path):
    checkpoint = saved(tmp_path, {"w": torch.zeros(4, 4), "n": 3})
    message = r"box \[0:5, 0:4\] reaches out of tensor 'w' of shape \[4, 4\]"
    with pytest.raises(ValueError, match=message):
        checkpoint.read("w", sk.Box((0, 0), (5, 4)))
    with pytest.raises(ValueError, match="'n' is an object and has no box"):
        checkpoint.read("n", sk.Box((), ()))
    with pytest.raises(KeyError, match=r"has no tensor or object named 'x'"):
        checkpoint.read("x")
    with pytest.raises(KeyError):
        checkpoint["x"]
    assert "x" not in checkpoint


def test_a_folder_without_a_checkpoint_raises(tmp_path):
    with pytest.raises(sk.NotACheckpoint, match="is empty or does not exist"):
        sk.open(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(sk.NotACheckpoint, match=r"has no \.metadata and no \.safetensors file"):
        sk.open(tmp_path)


def test_a_missing_or_truncated_file_is_named(tmp_path):
    saved(tmp_path, {"w": values("w", (300, 300), torch.float32)})
    (data,) = tmp_path.glob("*.distcp")
    whole = data.read_bytes()
    data.write_bytes(whole[:-1000])
    with pytest.raises(
        sk.Damaged, match=rf"{data.name}, 'w'.*the file ends at {len(whole) - 1000}"
    ):
        sk.open(tmp_path).read("w")
    assert not sk.open(tmp_path).verify().ok
    data.unlink()
    with pytest.raises(sk.Damaged, match=rf"{data.name}, 'w': the file is missing"):
        sk.open(tmp_path).read("w")


def test_a_stock_checkpoint_is_checked_by_its_zip_records(tmp_path):
    checkpoint = saved(tmp_path, {"w": values("w", (300, 300), torch.float32), "n": {"x": 1}})
    report = checkpoint.verify()
    assert report.ok
    assert report.checked_bytes > 300 * 300 * 4
    assert report.unchecked == (".metadata",)
    (data,) = tmp_path.glob("*.distcp")
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    (damage,) = sk.open(tmp_path).verify().damaged
    assert (damage.file, damage.name) == (data.name, "w")


def test_a_checkpoint_can_be_read_without_its_manifest(tmp_path):
    state = {"a": {"w": values("w", (7, 5), torch.bfloat16)}, "n": [1, 2]}
    sk.save(state, tmp_path)
    with_it, without = sk.open(tmp_path), sk.open(tmp_path, manifest=False)
    assert with_it.kind == "shardkeep"
    assert without.kind == "dcp"
    assert with_it.read("a.w").tobytes() == without.read("a.w").tobytes()
    assert with_it["n"].value == without["n"].value == [1, 2]
    (manifest,) = tmp_path.glob(".manifest-*.npz")
    manifest.unlink()
    with pytest.raises(sk.Damaged, match=r"the manifest is missing; open\(path, manifest=False\)"):
        sk.open(tmp_path)
    loaded = {"a": {"w": torch.zeros(7, 5, dtype=torch.bfloat16)}, "n": None}
    with pytest.raises(sk.Damaged):
        sk.load(loaded, tmp_path)
    stock.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    assert same(loaded["a"]["w"], state["a"]["w"])


@pytest.mark.parametrize("name", ["uint16", "uint32", "uint64"])
def test_unsigned_integers_are_carried_by_signed_ones_of_the_same_bits(tmp_path, name):
    dtype = getattr(torch, name)
    tensor = values(name, (300, 7), dtype)
    sk.save({"t": tensor}, tmp_path)
    for manifest in (True, False):
        checkpoint = sk.open(tmp_path, manifest=manifest)
        assert checkpoint["t"].dtype.name == name
        array = checkpoint.read("t", sk.Box((1, 2), (200, 3)))
        assert array.dtype.name == name
        assert array.tobytes() == bits(tensor[1:201, 2:5])
        assert checkpoint.verify().ok
    loaded = {"t": torch.zeros(300, 7, dtype=dtype)}
    stock.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    assert same(loaded["t"], tensor)
