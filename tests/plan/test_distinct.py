"""Rows, numbered by their content."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardkeep.plan.distinct import distinct

TABLES = st.integers(1, 3).flatmap(
    lambda width: st.lists(st.tuples(*[st.integers(-2, 2)] * width), max_size=20).map(
        lambda rows: (rows, width)
    )
)


@given(TABLES)
def test_equal_rows_have_one_number_in_ascending_order(case):
    rows, width = case
    table = np.array(rows, np.int64).reshape(len(rows), width)
    number, first = distinct(list(table.T))
    content = sorted(set(rows))
    assert number.tolist() == [content.index(row) for row in rows]
    assert first.tolist() == [rows.index(row) for row in content]
