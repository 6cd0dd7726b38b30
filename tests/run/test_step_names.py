"""Names of step folders: a name is a step's only if it is exactly the name of that step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkeep.run import StepNames

TEMPLATES = ["step_{step}", "step_{step:08}", "{step}", "ckpt-{step:03d}.dcp", "a{{b}}{step:d}"]


@pytest.mark.parametrize("template", TEMPLATES)
@given(step=st.integers(0, 10**18 - 1))
def test_the_step_is_parsed_from_its_name(template, step):
    names = StepNames(template)
    assert names.step(names.name(step)) == step


@given(template=st.sampled_from(TEMPLATES), text=st.text(max_size=12), step=st.integers(0, 10**6))
def test_only_exact_names_are_parsed_as_steps(template, text, step):
    names = StepNames(template)
    name = names.name(step)
    for other in (text, name + text, text + name, name.replace("1", text, 1)):
        found = names.step(other)
        assert found is None or names.name(found) == other


@pytest.mark.parametrize(
    "name",
    "step_07 step_ step_-7 step_+7 step_7.bak step_7~ step_7.tmp Step_7 step_7_8 xstep_7 step_1e3 "
    "step_７ step_٧ step_7\n step_0x1 step_1_000 .step_7 step_9999999999999999999".split(" "),
)
def test_similar_names_are_not_steps(name):
    assert StepNames().step(name) is None


def test_names_need_as_many_leading_zeros_as_the_template_demands():
    names = StepNames("step_{step:04}")
    assert names.name(7) == "step_0007"
    assert [names.step(name) for name in ("step_0007", "step_7", "step_00007")] == [7, None, None]
    assert names.step("step_12345") == 12345


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("steps", "name must contain {step} exactly once and no other field"),
        ("{step}{step}", "name must contain {step} exactly once and no other field"),
        ("{run}_{step}", "name must contain {step} exactly once and no other field"),
        ("{step!r}", "name must contain {step} exactly once and no other field"),
        ("{step:x}", "name must contain {step}, or {step:08} for a padded number"),
        ("{step:+}", "name must contain {step}, or {step:08} for a padded number"),
        ("run/{step}", "name must be the name of a single folder"),
        ("../{step}", "name must be the name of a single folder"),
    ],
)
def test_invalid_templates_are_refused(template, why):
    with pytest.raises(ValueError) as caught:
        StepNames(template)
    assert why in str(caught.value)


@pytest.mark.parametrize("step", [-1, 10**18])
def test_invalid_step_numbers_are_refused(step):
    with pytest.raises(
        ValueError, match=f"step must be 0 or more, with at most 18 digits, not {step}"
    ):
        StepNames().name(step)
