"""Sharded safetensors files are consolidated into complete ones."""

from __future__ import annotations

import inspect
import itertools
import json
import tracemalloc
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shardkeep as sk
from shardkeep.dcp import _consolidate_hf_safetensors as module
from shardkeep.dcp._consolidate_hf_safetensors import (
    _pieces,
    consolidate_safetensors_files,
    consolidate_safetensors_files_on_every_rank,
)
from shardkeep.dcp.bridge.torch_modules import torch_module
from shardkeep.format.safetensors.parse import KINDS
from shardkeep.format.safetensors.write import file_name, layout, of_parts
from shardkeep.stores.local.store import LocalPositionedWriter
from shardkeep.types import DType
from support import dcp_hf
from support.scenarios import same, values

safetensors = pytest.importorskip("safetensors.torch")
NAMES = [name for name in KINDS.values() if name != dcp_hf.FLOAT4 and hasattr(torch, name)]
INDEX = "model.safetensors.index.json"


def write_shards(folder: Path, files: list[dict]) -> None:
    """Write files with parts of tensors: name -> (part, its offsets)."""
    folder.mkdir(exist_ok=True)
    for number, parts in enumerate(files, 1):
        described = {
            name: (DType.named(str(part.dtype)), tuple(part.shape))
            for name, (part, _) in parts.items()
        }
        laid_out = layout(described, of_parts({name: begin for name, (_, begin) in parts.items()}))
        data = b"".join(
            parts[name][0].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            if parts[name][0].numel()
            else b""
            for name in laid_out.names
        )
        (folder / file_name(1, 1, number)).write_bytes(laid_out.header + data)


def halves(folder: Path, rows: int = 4) -> dict[str, torch.Tensor]:
    """Write four tensors, each in two files; return them."""
    whole = {name: values(name, (rows, 3), torch.int64) for name in "abcd"}
    cut = rows // 2
    write_shards(
        folder,
        [
            {name: (value[:cut], (0, 0)) for name, value in whole.items()},
            {name: (value[cut:], (cut, 0)) for name, value in whole.items()},
        ],
    )
    return whole


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors that safetensors' own loader finds by the index."""
    weights = json.loads((folder / INDEX).read_text())["weight_map"]
    files = {file: safetensors.load_file(folder / file) for file in set(weights.values())}
    assert {name for found in files.values() for name in found} == set(weights)
    return {name: files[file][name] for name, file in weights.items()}


def check(found: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(whole)
    assert [name for name in whole if not same(found[name], whole[name])] == []


@pytest.mark.skipif(
    torch_module("_consolidate_hf_safetensors") is None, reason="this torch has none"
)
@pytest.mark.parametrize(
    "function", [consolidate_safetensors_files, consolidate_safetensors_files_on_every_rank]
)
def test_signatures_are_torchs(function):
    stock = getattr(torch_module("_consolidate_hf_safetensors"), function.__name__)
    assert [(p.name, p.default) for p in inspect.signature(function).parameters.values()] == [
        (p.name, p.default) for p in inspect.signature(stock).parameters.values()
    ]


@st.composite
def grids(draw):
    """Return tensors, each cut into a grid whose parts are in some of a few files."""
    tensors = {}
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
        cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
        tensors[f"t{number}"] = draw(st.sampled_from(NAMES)), shape, cuts
    files = draw(st.integers(1, 4))
    return tensors, files, draw(st.integers(16, 200)), draw(st.integers(1, 3))


@given(grids())
def test_parts_of_any_grid_are_consolidated(made):
    tensors, files, slab, numbers = made
    whole = {
        name: values(name, shape, getattr(torch, kind))
        for name, (kind, shape, _) in tensors.items()
    }
    # A file has one part of a tensor, so there are as many more files as parts.
    shards: list[dict] = [{} for _ in range(files)]
    for name, (_, _, cuts) in tensors.items():
        spans = [list(itertools.pairwise(cut)) or [(0, 0)] for cut in cuts]
        for box in itertools.product(*spans):
            part = whole[name][tuple(slice(low, high) for low, high in box)]
            free = next((f for f in shards if name not in f), None)
            if free is None:
                shards.append(free := {})
            free[name] = part, tuple(low for low, _ in box)
    mapping = {name: 1 + n % numbers for n, name in enumerate(whole)}
    with TemporaryDirectory() as path, patch.object(module, "_MAX_SLAB_BYTES", slab):
        source, output = Path(path) / "in", Path(path) / "out"
        write_shards(source, shards)
        consolidate_safetensors_files(str(source), str(output), mapping, num_threads=2)
        check(loaded(output), whole)
        listing = json.loads((output / INDEX).read_text())
        assert listing["metadata"]["total_size"] == sum(v.nbytes for v in whole.values())
        assert {n: file_name(k, max(mapping.values())) for n, k in mapping.items()} == listing[
            "weight_map"
        ]
        for file in output.glob("*.safetensors"):
            # Hugging Face's transformers require the format in the metadata.
            with safetensors.safe_open(file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}


@given(st.lists(st.integers(0, 7), max_size=4).map(tuple), st.integers(1, 60))
def test_pieces_cover_a_tensor_in_order(shape, most):
    numbers = np.arange(prod(shape)).reshape(shape)
    cut = [numbers[box.slices].ravel() for box in _pieces(shape, most)]
    assert all(0 < len(piece) <= most for piece in cut)
    assert np.concatenate([np.zeros(0), *cut]).tolist() == numbers.ravel().tolist()


def test_memory_does_not_grow_with_the_tensors(tmp_path):
    rows, columns = 1 << 13, 1 << 12
    whole = torch.arange(rows * columns, dtype=torch.int32).reshape(rows, columns)
    write_shards(
        tmp_path,
        [{"w": (whole[:, :1000], (0, 0))}, {"w": (whole[:, 1000:], (0, 1000))}],
    )
    tracemalloc.start()
    consolidate_safetensors_files(str(tmp_path), str(tmp_path / "out"), {"w": 1})
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert whole.nbytes == 128 << 20
    assert most < 64 << 20
    assert torch.equal(loaded(tmp_path / "out")["w"], whole)


def test_a_missing_part_is_detected_before_anything_is_written(tmp_path):
    halves(tmp_path / "in")
    (tmp_path / "in" / file_name(1, 1, 1)).unlink()
    mapping = dict.fromkeys("abcd", 1)
    with pytest.raises(sk.FormatError, match=r"tensor 'a': its chunks have a hole at \[0:2, 0:3\]"):
        consolidate_safetensors_files(str(tmp_path / "in"), str(tmp_path / "out"), mapping)
    assert not (tmp_path / "out").exists()
    with pytest.raises(sk.NotACheckpoint, match=r"has no \.safetensors file"):
        consolidate_safetensors_files(str(tmp_path / "none"), str(tmp_path / "out"), mapping)


def test_a_truncated_file_is_detected(tmp_path):
    halves(tmp_path / "in")
    file = tmp_path / "in" / file_name(1, 1, 2)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(sk.FormatError, match=r"^shard-00002-.*its tensors end at \d+, the file at"):
        consolidate_safetensors_files(str(tmp_path / "in"), str(tmp_path / "out"), {"a": 1})


def test_invalid_mappings_are_refused(tmp_path):
    whole = halves(tmp_path / "in")
    paths = str(tmp_path / "in"), str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"^fqn_to_index_mapping lacks 3 tensors: b, c, d$"):
        consolidate_safetensors_files(*paths, {"a": 1})
    with pytest.raises(ValueError, match="is empty: it must number the file of each tensor"):
        consolidate_safetensors_files(*paths, {})
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="^1 tensors of the mapping are in no file: lm_head$"):
        consolidate_safetensors_files(*paths, {"a": 1, "b": 1, "c": 3, "d": 3, "lm_head": 2})
    check(loaded(tmp_path / "out"), whole)
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch):
    whole = halves(tmp_path / "in")
    paths = str(tmp_path / "in"), str(tmp_path / "out")
    mapping = {"a": 1, "b": 1, "c": 2, "d": 2}
    consolidate_safetensors_files(*paths, mapping)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    halves(tmp_path / "in", rows=8)
    written = []
    write_at = LocalPositionedWriter.write_at

    def full(self, offset, parts) -> None:
        written.append(offset)
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        write_at(self, offset, parts)

    with monkeypatch.context() as patched:
        patched.setattr(LocalPositionedWriter, "write_at", full)
        with pytest.raises(OSError, match="No space left"):
            consolidate_safetensors_files(*paths, mapping)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    check(loaded(tmp_path / "out"), whole)


def test_one_process_may_consolidate_all_files(tmp_path):
    whole = halves(tmp_path / "in")
    mapping = {name: n for n, name in enumerate("abcd", 1)}
    consolidate_safetensors_files_on_every_rank(
        str(tmp_path / "in"), str(tmp_path / "out"), mapping, num_threads=2
    )
    check(loaded(tmp_path / "out"), whole)


@pytest.mark.gloo
@pytest.mark.skipif(torch_module("hf_storage") is None, reason="this torch has none")
def test_files_of_stock_torch_are_consolidated_on_ranks(gloo, tmp_path):
    assert gloo.run(dcp_hf.stocks_shards, str(tmp_path)) == ["fine"] * 4
    whole = dcp_hf.wholes()
    check(loaded(tmp_path / "whole"), whole)
    assert len(list(tmp_path.glob("shard-*"))) == 12
    opened = sk.open(tmp_path)
    assert opened.read("tiles.int16").tobytes() == whole["tiles.int16"].numpy().tobytes()


@pytest.mark.gloo
def test_a_failure_on_one_rank_is_raised_on_all(gloo, tmp_path):
    halves(tmp_path)
    told = gloo.run(dcp_hf.every_rank_fails, str(tmp_path))
    assert told[2].startswith("ValueError: fqn_to_index_mapping lacks 1 tensors: c")
    for other in (0, 1, 3):
        assert told[other].startswith("RankFailed: rank 2 on")
        assert "lacks 1 tensors: c" in told[other]
    assert not (tmp_path / "whole" / INDEX).exists()
