"""The reference implementation reads the safetensors files that are written."""

from __future__ import annotations

import json
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkeep.errors import Conflict
from shardkeep.format.safetensors.parse import KINDS, index_of, read_header, weight_map
from shardkeep.format.safetensors.write import (
    file_name,
    is_file_name,
    layout,
    listing,
    of_parts,
    of_wholes,
)
from shardkeep.types import DType

DTYPES = [DType.named(name) for name in KINDS.values()]
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
tensors = st.dictionaries(st.text(max_size=8), st.tuples(st.sampled_from(DTYPES), shapes)).filter(
    lambda made: (
        "__metadata__" not in made
        and not any(dtype.name.startswith("float4") and not shape for dtype, shape in made.values())
    )
)


def parsed(data: bytes):
    return read_header(lambda at, length: data[at : at + length], len(data), file="f")


@given(tensors)
def test_written_headers_are_read(made) -> None:
    laid_out = layout(made, of_wholes())
    assert len(laid_out.header) % 8 == 0
    header = parsed(laid_out.header + bytes(laid_out.nbytes))
    assert header.metadata == {"format": "pt"}
    assert {name: (e.dtype, e.shape) for name, e in header.tensors.items()} == made
    ends = 0
    for name in laid_out.names:
        entry = header.tensors[name]
        assert entry.start == len(laid_out.header) + ends  # in this order, without gaps
        assert entry.start % entry.dtype.itemsize == 0
        ends += entry.nbytes
    assert ends == laid_out.nbytes


@given(tensors)
def test_the_reference_reads_written_files(made) -> None:
    reference = pytest.importorskip("safetensors")
    laid_out = layout(made, of_wholes())
    data = laid_out.header + bytes(n % 251 for n in range(laid_out.nbytes))
    found = dict(reference.deserialize(data))
    assert set(found) == set(made)
    at = len(laid_out.header)
    for name in laid_out.names:
        dtype, shape = made[name]
        nbytes = prod(shape) * dtype.itemsize
        assert KINDS[found[name]["dtype"]] == dtype.name
        assert bytes(found[name]["data"]) == data[at : at + nbytes]
        at += nbytes


def test_shards_contain_their_offsets() -> None:
    four = DType.named("float32")
    files = {}
    for number, begin in enumerate([(0, 0), (2, 0)]):
        laid_out = layout({"w": (four, (2, 3))}, of_parts({"w": begin}))
        header = parsed(laid_out.header + bytes(laid_out.nbytes))
        assert header.metadata["DCP_VERSION"] == "1.0"
        assert header.metadata["format"] == "pt"
        assert json.loads(header.metadata["DCP_SHARDING_INFO"]) == {
            "w": {"saved_offsets": list(begin)}
        }
        files[f"{number}"] = header
    assert index_of(files, None).tensors.shape.tolist() == [[4, 3]]


@pytest.mark.parametrize("name", ["complex128", "qint8", "uint4", "bits8", "complex32"])
def test_dtypes_that_the_format_lacks_are_refused(name) -> None:
    with pytest.raises(
        Conflict, match=rf"^tensor 'a': safetensors files can't hold {name}\[2, 3\]$"
    ):
        layout({"a": (DType.named(name), (2, 3))}, {})


def test_names_and_shapes_that_the_format_lacks_are_refused() -> None:
    small = DType.named("int8")
    with pytest.raises(Conflict, match="can be named '__metadata__'"):
        layout({"__metadata__": (small, (1,))}, {})
    with pytest.raises(Conflict, match="name is not valid text"):
        layout({"\ud800": (small, (1,))}, {})
    with pytest.raises(Conflict, match=r"can't hold float4_e2m1fn_x2\[\]"):
        layout({"a": (DType.named("float4_e2m1fn_x2"), ())}, {})


def test_more_names_than_a_header_can_hold_are_refused(monkeypatch) -> None:
    monkeypatch.setattr("shardkeep.format.safetensors.write.MAX_HEADER", 1000)
    with pytest.raises(Conflict, match=r"100 tensors need a header of .* share them out over more"):
        layout({f"{n}": (DType.named("int8"), (1,)) for n in range(100)}, {})


def test_names_of_files() -> None:
    assert file_name(1, 3) == "model-00001-of-00003.safetensors"
    assert file_name(1, 1, 2) == "shard-00002-model-00001-of-00001.safetensors"
    assert file_name(1, 1, 2, 2) == "shard-00002-model-00001-of-00001-part-00002.safetensors"
    for name in (
        file_name(123456, 123456),
        file_name(1, 1, 2, 2),
        file_name(1, 1) + f".{7:016}.tmp",
    ):
        assert is_file_name(name)
    for name in ("model.safetensors", "other-00001-of-00003.safetensors", "sub/" + file_name(1, 1)):
        assert not is_file_name(name)


def test_the_index_of_a_set() -> None:
    data = listing({"a": "one", "b": "two"}, 12)
    assert weight_map(data) == {"a": "one", "b": "two"}
    assert json.loads(data)["metadata"] == {"total_size": 12}
