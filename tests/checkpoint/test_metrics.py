"""Metrics: only finite numbers are saved, and only finite numbers are read."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardkeep.checkpoint.metrics import finite, metrics_in

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), st.floats() | st.integers(), max_size=6))
def test_saved_metrics_are_read_back(metrics):
    kept, left = finite(metrics)
    assert metrics_in({"metrics": kept}) == kept
    assert set(kept) | set(left) == set(metrics) and not set(kept) & set(left)
    for name in kept:
        assert math.isfinite(kept[name]) and kept[name] == float(metrics[name])


@given(st.dictionaries(st.text() | st.just("metrics"), ANYTHING))
@example({"metrics": {"": 2**53 + 1}})  # not representable as a float
def test_any_header_is_read_safely(header):
    for name, value in metrics_in(header).items():
        assert type(name) is str and type(value) is float and math.isfinite(value)
        assert float(header["metrics"][name]) == value


def test_all_kinds_of_real_numbers_are_accepted():
    given = {
        "int": 3, "numpy": np.float32(0.5), "one": np.array(2), "decimal": Decimal("0.25"),
        "fraction": Fraction(1, 8), "true": True,
    }  # fmt: skip
    kept, left = finite(given)
    assert kept == {
        "int": 3.0, "numpy": 0.5, "one": 2.0, "decimal": 0.25, "fraction": 0.125, "true": 1.0
    }  # fmt: skip
    assert {type(value) for value in kept.values()} == {float} and left == ()


def test_a_tensor_with_one_element_is_a_number():
    torch = pytest.importorskip("torch")
    assert finite({"loss": torch.tensor(1.5, requires_grad=True)}) == ({"loss": 1.5}, ())
    with pytest.raises(TypeError, match="metric 'loss' must be a number, not a Tensor"):
        finite({"loss": torch.ones(2)})


def test_names_of_metrics_that_are_not_finite_are_returned():
    assert finite({"a": math.nan, "b": -math.inf, "c": 1, "d": 10**400}) == (
        {"c": 1.0},
        ("a", "b", "d"),
    )


@pytest.mark.parametrize(
    ("metrics", "error", "why"),
    [
        ({"loss": "0.5"}, TypeError, "metric 'loss' must be a number, not a str"),
        ({"loss": None}, TypeError, "metric 'loss' must be a number, not a NoneType"),
        ({"loss": [1.0]}, TypeError, "metric 'loss' must be a number, not a list"),
        ({"loss": 1j}, TypeError, "metric 'loss' must be a number, not a complex"),
        ({3: 1.0}, TypeError, "the name of a metric must be a str, not 3"),
        (
            dict.fromkeys(map(str, range(10_001)), 1.0),
            ValueError,
            "a step may have at most 10000 metrics, not 10001",
        ),
    ],
)
def test_invalid_metrics_are_refused(metrics, error, why):
    with pytest.raises(error, match=re.escape(why)):
        finite(metrics)
