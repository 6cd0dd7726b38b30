"""Messages between ranks are restored exactly, and invalid ones are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from format.strategies import indexes, plain
from shardkeep.errors import FormatError
from shardkeep.format.messages.claims import outline, pack_claim, unpack_claim
from shardkeep.format.messages.columns import pack, unpack
from shardkeep.types import Claim, Index, Structure

CODES = st.sampled_from(["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8"])


@st.composite
def columns(draw: Any) -> Any:
    shape = tuple(draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)))
    dtype = np.dtype(draw(CODES))
    count = int(np.prod(shape))
    data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    return np.frombuffer(data, dtype).reshape(shape)


MESSAGES = st.tuples(
    st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3), columns(), max_size=4),
)


@given(MESSAGES)
def test_columns_are_restored(message: Any) -> None:
    values, tables = message
    found, read = unpack(pack(values, tables))
    assert found == values
    assert list(read) == list(tables)
    for name, table in tables.items():
        assert read[name].dtype == table.dtype
        assert read[name].shape == table.shape
        assert read[name].tobytes() == table.tobytes()


@given(MESSAGES, st.data())
def test_a_truncated_message_is_refused_or_complete(message: Any, data: Any) -> None:
    block = pack(*message)
    cut = data.draw(st.integers(0, len(block) - 1))
    try:
        values, tables = unpack(block[:cut])
    except FormatError:
        return
    assert pack(values, tables).rstrip(b"\0") == block.rstrip(b"\0")


@pytest.mark.parametrize("code", ["O", "V8", "<f8", "i4,i4", "M8[s]", "("])
def test_only_columns_of_integers_are_accepted(code: str) -> None:
    block = pack({}, {"column": np.arange(2)}).replace(b'"<i8"', b'"' + code.encode() + b'"')
    size = (len(block) - 8 - 16).to_bytes(8, "little")
    with pytest.raises(FormatError, match="invalid message from another rank"):
        unpack(size + block[8:])


def claim(index: Index) -> Claim:
    """Return a claim with the names and the structure of an index."""
    names = (*index.tensors.names, *index.objects.names)
    return Claim(
        index.tensors,
        index.chunks.tensor,
        index.chunks.offsets,
        index.chunks.sizes,
        np.arange(len(index.chunks.tensor)),
        index.objects.names,
        dict(index.objects.values),
        index.structure or Structure({name: (name,) for name in names}, {(): "dict"}),
        index.legacy_duplicates,
    )


@given(indexes(), indexes())
def test_claims_are_restored(one: Index, other: Index) -> None:
    lead, mine = claim(one), claim(other)
    assert outline(mine) == outline(mine)
    block = pack_claim(mine, outline(mine))
    assert plain(unpack_claim(block, lead)) == plain(mine)
    same = unpack_claim(pack_claim(lead, None), lead)
    assert plain(same) == plain(lead)
    assert same.structure is lead.structure and same.tensors is lead.tensors
