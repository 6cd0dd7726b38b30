"""Headers of safetensors files, and sets of files, are read as by the reference implementation."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardkeep.errors import FormatError
from shardkeep.format.safetensors.parse import Header, index_of, read_header, weight_map


def header(data: bytes, file: str = "model.safetensors") -> Header:
    def read_at(offset: int, length: int) -> bytes:
        assert offset + length <= len(data)
        return data[offset : offset + length]

    return read_header(read_at, len(data), file=file)


def file_of(tensors: Mapping[str, Any], payload: bytes) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + payload


def part(rows: int, begin: int, name: str = "w") -> bytes:
    info = json.dumps({name: {"saved_offsets": [begin, 0]}})
    entry = {"dtype": "F32", "shape": [rows, 3], "data_offsets": [0, rows * 12]}
    meta = {"DCP_SHARDING_INFO": info, "DCP_VERSION": "1.0"}
    return file_of({"__metadata__": meta, name: entry}, bytes(rows * 12))


def test_files_of_the_reference_are_read() -> None:
    reference = pytest.importorskip("safetensors.numpy")
    arrays = {
        "a": np.arange(6.0, dtype="f4").reshape(2, 3),
        "b": np.array([True, False]),
        "c": np.zeros((0, 4), "i8"),
        "d": np.array(7, "u2"),
    }
    data = reference.save(arrays, metadata={"by": "me"})
    found = header(data)
    assert found.metadata == {"by": "me"}
    for name, array in arrays.items():
        entry = found.tensors[name]
        assert (entry.dtype.numpy, entry.shape) == (array.dtype, array.shape)
        assert data[entry.start : entry.start + entry.nbytes] == array.tobytes()
    index = index_of({"model.safetensors": found}, None)
    assert set(index.tensors.names) == set(arrays) and index.structure is None
    assert index.chunks.payload.tolist() == index.chunks.item.tolist()
    assert index.chunks.length.tolist() == [found.tensors[n].nbytes for n in index.tensors.names]


def test_four_bit_floats_are_stored_in_pairs() -> None:
    entry = {"dtype": "F4", "shape": [2, 6], "data_offsets": [0, 6]}
    found = header(file_of({"a": entry}, bytes(6))).tensors["a"]
    assert (found.dtype.name, found.shape, found.nbytes) == ("float4_e2m1fn_x2", (2, 3), 6)


def test_a_set_with_shards() -> None:
    headers = {f"shard-{n}.safetensors": header(part(2, 2 * n)) for n in range(3)}
    index = index_of(headers, None)
    assert index.tensors.shape.tolist() == [[6, 3]]
    assert index.chunks.offsets.tolist() == [[0, 0], [2, 0], [4, 0]]
    assert index.files == tuple(headers)
    same = index_of({"a": header(part(2, 0)), "b": header(part(2, 0))}, None)
    assert same.chunks.offsets.tolist() == [[0, 0]]


def test_contradicting_shards_are_refused() -> None:
    other = file_of({"w": {"dtype": "I8", "shape": [1, 3], "data_offsets": [0, 3]}}, b"abc")
    with pytest.raises(FormatError, match="b, tensor 'w': parts of two kinds"):
        index_of({"a": header(part(2, 0)), "b": header(other)}, None)
    with pytest.raises(FormatError, match="it is in a and in b, and no part of it"):
        index_of({"a": header(other), "b": header(other)}, None)
    with pytest.raises(FormatError, match="two parts start at the same offsets"):
        index_of({"a": header(part(2, 0)), "b": header(part(3, 0))}, None)


def test_the_index_of_a_set_decides() -> None:
    data = file_of({"w": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]}}, b"abc")
    headers = {"a": header(data), "b": header(data)}
    assert index_of(headers, {"w": "b"}).files == ("b",)
    with pytest.raises(FormatError, match="c, tensor 'w': it should be here"):
        index_of(headers, {"w": "c"})


def test_the_weight_map_is_checked() -> None:
    assert weight_map(b'{"metadata": {}, "weight_map": {"a": "./x/y"}}') == {"a": "x/y"}
    for data, what in (
        (b'{"weight_map": {"a": "../x"}}', "leaves the checkpoint's folder"),
        (b'{"weight_map": {"a": 1}}', "no weight_map"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "a name occurs twice"),
        (b"[1]", "not a JSON object"),
    ):
        with pytest.raises(FormatError, match=f"model.safetensors.index.json.*{what}"):
            weight_map(data)


def test_mutations_give_a_header_or_a_format_error() -> None:
    source = random.Random(5)
    data = part(2, 0)
    errors = 0
    for _ in range(3000):
        broken = bytearray(data)
        for _ in range(source.randint(1, 3)):
            broken[source.randrange(len(broken))] = source.randrange(256)
        try:
            index_of({"a": header(bytes(broken))}, None)
        except FormatError:
            errors += 1
    assert 1000 < errors < 3000


@pytest.mark.torch
def test_sets_written_by_dcp_are_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    hf = pytest.importorskip("torch.distributed.checkpoint.hf_storage")
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
    writer = hf.HuggingFaceStorageWriter(path=str(tmp_path), save_distributed=True)
    dcp.save(state, storage_writer=writer, no_dist=True)
    files = sorted(tmp_path.rglob("*.safetensors"))
    index = index_of({file.name: header(file.read_bytes()) for file in files}, None)
    assert dict(zip(index.tensors.names, index.tensors.ndim.tolist(), strict=True)) == {
        "a": 2,
        "b": 1,
    }
