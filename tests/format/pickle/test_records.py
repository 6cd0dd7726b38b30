"""Records and texts that are written together equal those that are written one by one."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkeep.format.pickle import records as module
from shardkeep.format.pickle.records import integers, records, references
from shardkeep.format.pickle.writer import Pickle, reference
from shardkeep.format.texts import joined

TEXTS = st.lists(
    st.text(max_size=5) | st.sampled_from(["\udc80", "é\ud800", "a" * 300]), max_size=6
)


@st.composite
def layouts(draw):
    count = draw(st.integers(0, 7))
    parts = []
    for _ in range(draw(st.integers(1, 5))):
        part = draw(st.binary(max_size=4))
        if draw(st.booleans()):
            rows = draw(st.lists(st.binary(min_size=3, max_size=3), min_size=count, max_size=count))
            part = np.frombuffer(b"".join(rows), np.uint8).reshape(count, 3)
        if draw(st.booleans()):
            mask = draw(st.lists(st.booleans(), min_size=count, max_size=count))
            part = part, np.array(mask, np.bool_)
        parts.append(part)
    return count, parts


@given(layouts(), st.integers(1, 4))
def test_records_are_their_parts_in_order(case, step):
    count, parts = case
    expected = b""
    for row in range(count):
        for part in parts:
            data, mask = part if isinstance(part, tuple) else (part, None)
            if mask is None or mask[row]:
                expected += data if isinstance(data, bytes) else data[row].tobytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_STEP", step)
        assert records(count, parts) == expected


@given(st.lists(st.integers(0, 2**63 - 1) | st.sampled_from([255, 256, 2**31 - 1, 2**31])))
def test_integers_are_restored(values):
    coded = integers(np.array(values, np.int64))
    assert [pickle.loads(row.tobytes() + b".") for row in coded] == values


@given(TEXTS, TEXTS)
def test_texts_are_restored_from_a_pickle(before, values):
    out = Pickle()
    for text in before:
        out.text(text)
    numbers = out.texts(values)
    late = out.text("late")
    body = references(numbers).tobytes() + reference(late)
    assert pickle.loads(out.finish(b"(", body, b"l")) == [*values, "late"]


@given(TEXTS, st.integers(0, 3))
def test_joined_texts_are_their_bytes_and_lengths(texts, gap):
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    data, lengths = joined(texts, gap)
    assert data == bytes(gap).join(encoded)
    assert lengths.tolist() == list(map(len, encoded))
