"""Columns of any integers are restored, and take no more space than necessary."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkeep.format.manifest.archive import Archive, Writer

EDGES = sorted(
    {s * 2**b + d for b in (0, 7, 8, 15, 16, 31, 32, 63) for s in (-1, 1) for d in (-1, 0)}
)
NUMBERS = st.sampled_from([edge for edge in EDGES if -(2**63) <= edge < 2**63])


def written(values, **more):
    out = Writer()
    out.column("x", values, **more)
    return out.finish()


def archive(data):
    return Archive(lambda offset, length: data[offset : offset + length], len(data), file="m")


@given(st.lists(NUMBERS, min_size=1, max_size=6))
def test_a_column_is_stored_in_the_smallest_sufficient_type(numbers):
    values = np.array(numbers, dtype=np.int64)
    data = written(values)
    stored = np.load(io.BytesIO(data))["x"]
    kinds = "bhiq" if values.min() < 0 else "BHIQ"
    fits = [
        np.dtype(k)
        for k in kinds
        if np.iinfo(k).min <= values.min() <= values.max() <= np.iinfo(k).max
    ]
    assert stored.dtype == fits[0]
    assert stored.tolist() == numbers
    assert archive(data).column("x", len(numbers)).tolist() == numbers


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0), (2, 3), (300, 2)])
def test_columns_of_every_shape_and_order_are_restored(shape):
    values = np.arange(np.prod(shape), dtype=np.int64).reshape(shape[::-1]).T
    assert archive(written(values)).column("x", *shape).tolist() == values.tolist()


@pytest.mark.parametrize(
    ("count", "packed", "method"),
    [(100, True, "stored"), (5000, True, "deflated"), (5000, False, "stored")],
)
def test_only_large_columns_are_compressed_and_only_on_request(count, packed, method):
    data = written(np.zeros(count, np.int64), packed=packed)
    (member,) = zipfile.ZipFile(io.BytesIO(data)).infolist()
    kinds = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED}
    assert member.compress_type == kinds[method]
    assert archive(data).column("x", count).tolist() == [0] * count
