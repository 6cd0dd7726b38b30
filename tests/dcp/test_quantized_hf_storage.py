"""Block-quantized Hugging Face checkpoints are dequantized while they are read."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import torch.distributed.checkpoint as stock

import shardkeep as sk
import shardkeep.dcp as dcp
from support.dcp_hf import Parts
from support.scenarios import same, values

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = [pytestmark, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

Reader = dcp.QuantizedHuggingFaceStorageReader
MEANING = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def write(folder, *files) -> None:
    """Write a set of files with an index."""
    weights = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        safetensors.save_file(tensors, folder / name)
        weights |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def float8(rows: int, columns: int, block: int) -> tuple[dict, torch.Tensor]:
    """Return a float8 matrix with its scales, and its values computed block by block."""
    made = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=made).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // block), -(-columns // block), generator=made) + 0.5
    meaning = weight.to(torch.float32)
    for row in range(0, rows, block):
        for column in range(0, columns, block):
            meaning[row : row + block, column : column + block] *= scales[
                row // block, column // block
            ]
    return {"m.weight": weight, "m.weight_scale_inv": scales}, meaning


def mxfp4(*outer: int, groups: int = 3, nbytes: int = 4) -> tuple[dict, torch.Tensor]:
    """Return packed 4-bit floats with exponents, and their values computed one by one."""
    blocks = values("b", (*outer, groups, nbytes), torch.uint8)
    scales = values("s", (*outer, groups), torch.uint8) % 20 + 117
    meaning = []
    for row, exponents in zip(
        blocks.reshape(-1, groups, nbytes), scales.reshape(-1, groups), strict=True
    ):
        for group, exponent in zip(row, exponents, strict=True):
            for byte in group.tolist():
                for nibble in (byte & 15, byte >> 4):
                    meaning.append(MEANING[nibble] * 2.0 ** (int(exponent) - 127))
    whole = torch.tensor(meaning).reshape(*outer, groups * nbytes * 2)
    return {"m_blocks": blocks, "m_scales": scales}, whole


def part(meaning: torch.Tensor, *cuts: slice) -> tuple[Parts, torch.Tensor]:
    """Return a template for a part of a tensor, and the expected values."""
    ranges = [range(*cut.indices(n)) for cut, n in zip(cuts, meaning.shape, strict=True)]
    box = tuple(r.start for r in ranges), tuple(len(r) for r in ranges)
    return Parts.of(torch.zeros_like(meaning), [box]), meaning[cuts]


@pytest.mark.parametrize("shape", [(256, 256), (300, 130), (5, 7)])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_float8_tensors_are_dequantized(tmp_path, shape, apart, target):
    tensors, meaning = float8(*shape, 128)
    plain = {"bias": torch.arange(3.0)}
    weight, scales = ({name: value} for name, value in tensors.items())
    write(tmp_path, *([{**weight, **plain}, scales] if apart else [{**tensors, **plain}]))
    loaded = {"m.weight": torch.zeros(shape, dtype=target), "bias": torch.zeros(3)}
    reader = Reader(tmp_path, target_dtype=target)
    metadata = reader.read_metadata().state_dict_metadata
    assert metadata["m.weight"].properties.dtype == target
    dcp.load(loaded, storage_reader=reader)
    assert same(loaded["m.weight"], meaning.to(target))
    assert loaded["bias"].tolist() == [0, 1, 2]


CUTS = [
    (slice(None), slice(None)),
    (slice(3, 9), slice(1, 6)),
    (slice(4, 8), slice(4, 8)),
    (slice(10, 11), slice(0, 1)),
    (slice(0, 0), slice(0, 5)),
]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("step", [1, 1 << 22])
def test_any_part_of_a_float8_tensor_is_dequantized(tmp_path, cuts, step, monkeypatch):
    monkeypatch.setattr("shardkeep.dcp.quantized_hf_storage._VALUES_PER_STEP", step)
    tensors, meaning = float8(11, 10, 4)
    write(tmp_path, tensors)
    wanted, expected = part(meaning, *cuts)
    dcp.load({"m.weight": wanted}, storage_reader=Reader(tmp_path, block_size=4))
    assert same(wanted.plain[cuts], expected)
    assert wanted.plain.count_nonzero() == expected.count_nonzero()


@pytest.mark.parametrize("outer", [(2, 3), (4,), (2, 2, 2)])
@pytest.mark.parametrize("last", [slice(None), slice(0, 8), slice(5, 19), slice(23, 24)])
@pytest.mark.parametrize("step", [1, 1 << 22])
def test_any_part_of_an_mxfp4_tensor_is_dequantized(tmp_path, outer, last, step, monkeypatch):
    monkeypatch.setattr("shardkeep.dcp.quantized_hf_storage._VALUES_PER_STEP", step)
    tensors, meaning = mxfp4(*outer)
    write(tmp_path, tensors)
    wanted, expected = part(meaning, slice(1, 2), *[slice(None)] * (len(outer) - 1), last)
    dcp.load({"m_blocks": wanted}, storage_reader=Reader(tmp_path))
    assert same(wanted.plain[(slice(1, 2), ..., last)], expected)
    assert wanted.plain.count_nonzero() == expected.count_nonzero()


@pytest.mark.skipif(not hasattr(stock, "QuantizedHuggingFaceStorageReader"), reason="none here")
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
def test_values_equal_those_of_stock_torch(tmp_path, target):
    """This compares float8 only: of mxfp4, stock torch 2.13 reads only the first values."""
    tensors, meaning = float8(300, 200, 128)
    write(tmp_path, tensors)
    found = []
    for module in (stock, dcp):
        loaded = {"m.weight": torch.zeros_like(meaning, dtype=target)}
        reader = module.QuantizedHuggingFaceStorageReader(str(tmp_path), target_dtype=target)
        module.load(loaded, storage_reader=reader)
        found.append(loaded["m.weight"])
    assert same(*found)


def test_one_file_without_an_index_is_read(tmp_path):
    tensors, meaning = float8(5, 7, 128)
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    loaded = {"m.weight": torch.zeros_like(meaning)}
    dcp.load(loaded, storage_reader=Reader(tmp_path))
    assert same(loaded["m.weight"], meaning)


def test_tensors_without_scales_are_unchanged(tmp_path):
    tensors = {"m.weight": torch.ones(2, 2), "m_blocks": torch.arange(4)}
    write(tmp_path, tensors)
    loaded = {name: torch.zeros_like(value) for name, value in tensors.items()}
    dcp.load(loaded, storage_reader=Reader(tmp_path))
    assert all(same(loaded[name], value) for name, value in tensors.items())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"m.weight_scale_inv": torch.ones(1, 2)},
         r"'m.weight' has the shape \[200, 200\]: its scales should be \[2, 2\], one for "
         r"each block of 128 x 128, but 'm.weight_scale_inv' is \[1, 2\]"),
        ({"m.weight": torch.ones(2, 3, 4)},
         r"'m.weight': torch.float32\[2, 3, 4\] is not a known quantized format"),
        ({"m_scales": torch.zeros(2, 3, 4, dtype=torch.uint8)},
         r"'m_blocks' has .* should be \[2, 3, 3\], one for each group, but "
         r"'m_scales' is \[2, 3, 4\]"),
        ({"m_blocks": torch.zeros(2, 3, 3, 4)}, "'m_blocks': torch.float32.* is not a known"),
    ],
)  # fmt: skip
def test_invalid_scales_are_refused(tmp_path, change, told):
    write(tmp_path, {**float8(200, 200, 128)[0], **mxfp4(2, 3)[0], **change})
    with pytest.raises(sk.FormatError, match=told):
        dcp.load({"m.weight": torch.zeros(200, 200)}, storage_reader=Reader(tmp_path))


def test_quantized_tensors_in_parts_are_refused(tmp_path):
    whole = torch.ones(4, 4)
    parts = Parts.of(whole, [((0, 0), (2, 4)), ((2, 0), (2, 4))])
    state = {"m.weight": parts, "m.weight_scale_inv": torch.ones(1, 1)}
    writer = dcp.HuggingFaceStorageWriter(tmp_path, save_distributed=True)
    dcp.save(state, storage_writer=writer)
    with pytest.raises(
        sk.FormatError, match=r"'m\.weight' is sharded into 2 parts; quantized tensors must be"
    ):
        dcp.load({"m.weight": torch.zeros(4, 4)}, storage_reader=Reader(tmp_path))
