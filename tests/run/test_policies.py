"""Retention policies: which steps each keeps, and that `|` keeps what either of two keeps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardkeep as sk
from shardkeep.run.policies import steps_to_delete
from shardkeep.types import Step

METRICS = st.dictionaries(st.sampled_from(["loss", "acc"]), st.floats(-9, 9), max_size=2)
STEPS = st.dictionaries(st.integers(0, 60), METRICS, max_size=12).map(
    lambda found: [Step(number, found[number]) for number in sorted(found)]
)
SIMPLE = st.one_of(
    st.builds(sk.KeepLast, st.integers(1, 5)),
    st.builds(sk.KeepEvery, st.integers(1, 20)),
    st.builds(
        sk.KeepBest,
        st.sampled_from(["loss", "acc", "other"]),
        st.integers(1, 4),
        st.sampled_from(["min", "max"]),
    ),
)


class Odd:
    """A policy without a base class, as users may write one."""

    def keep(self, steps):
        return [step.number for step in steps if step.number % 2]


@given(STEPS, st.integers(1, 5))
def test_keep_last_keeps_the_highest_steps(steps, n):
    numbers = [step.number for step in steps]
    kept = sk.KeepLast(n).keep(steps)
    assert len(kept) == min(n, len(steps))
    assert all(number > other for number in kept for other in set(numbers) - set(kept))


@given(STEPS, st.integers(1, 20))
def test_keep_every_keeps_multiples(steps, n):
    kept = sk.KeepEvery(n).keep(steps)
    assert kept == {step.number for step in steps} & set(range(0, 61, n))


@given(STEPS, st.integers(1, 4), st.sampled_from(["min", "max"]))
def test_keep_best_keeps_the_best_steps(steps, n, mode):
    having = {step.number: step.metrics["loss"] for step in steps if "loss" in step.metrics}
    kept = sk.KeepBest("loss", n, mode).keep(steps)
    assert len(kept) == min(n, len(having)) and set(kept) <= set(having)
    for number in kept:
        for other in set(having) - set(kept):
            worse = (
                having[other] - having[number] if mode == "min" else having[number] - having[other]
            )
            assert worse > 0 or (worse == 0 and number > other)


@given(STEPS, SIMPLE, SIMPLE, SIMPLE)
def test_a_union_keeps_what_any_policy_keeps(steps, a, b, c):
    kept = set((a | b | c).keep(steps))
    assert kept == {*a.keep(steps), *b.keep(steps), *c.keep(steps)}
    assert kept == set((a | (b | c)).keep(steps))
    odd = {step.number for step in steps if step.number % 2}
    assert set((a | Odd()).keep(steps)) == set((Odd() | a).keep(steps)) == {*a.keep(steps), *odd}


@given(STEPS, SIMPLE, st.sets(st.integers(0, 60), max_size=3))
def test_kept_and_protected_steps_are_not_deleted(steps, policy, protected):
    gone = steps_to_delete(steps, policy, protected)
    assert set(gone) == {step.number for step in steps} - set(policy.keep(steps)) - protected
    assert gone == sorted(gone)


@pytest.mark.parametrize("make", [sk.KeepLast, sk.KeepEvery, lambda n: sk.KeepBest("loss", n)])
@pytest.mark.parametrize("n", [0, -1, 1.5, True, "3"])
def test_invalid_numbers_are_refused(make, n):
    with pytest.raises(ValueError, match=r"n of Keep\w+ must be a whole number from 1 on, not"):
        make(n)


def test_an_invalid_mode_is_refused():
    with pytest.raises(ValueError, match="mode must be 'min' or 'max', not 'least'"):
        sk.KeepBest("loss", mode="least")
