"""Numbering of rows by their content."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from shardkeep.plan.distinct import distinct

NUMBERS = st.integers(-2, 2) | st.sampled_from([2**62, -(2**63), 2**63 - 1])
TABLES = st.integers(1, 3).flatmap(
    lambda width: st.lists(st.tuples(*[NUMBERS] * width), max_size=20).map(
        lambda rows: (rows, width)
    )
)


@given(TABLES)
@example(([(0, 0), (1, 2), (0, 0), (1, 1)], 2))
def test_equal_rows_have_one_number_in_ascending_order(case):
    rows, width = case
    table = np.array(rows, np.int64).reshape(len(rows), width)
    number, first = distinct(list(table.T))
    content = sorted(set(rows))
    assert number.tolist() == [content.index(row) for row in rows]
    assert first.tolist() == [rows.index(row) for row in content]
