"""Public docstrings are complete: each class and function that users call shows an example."""

from __future__ import annotations

import doctest
import inspect

import pytest

import shardkeep as sk


def _shows_its_use(name: str) -> bool:
    """Whether a public name is a class or function whose docstring must have an example."""
    value = getattr(sk, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return False
    # All events are received in the same way: the example is in `Event`.
    return value is sk.Event or not (inspect.isclass(value) and issubclass(value, sk.Event))


NAMES = sorted(filter(_shows_its_use, sk.__all__))


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_an_example_that_is_valid_code(name):
    text = inspect.getdoc(getattr(sk, name)) or ""
    assert "Example:" in text
    examples = doctest.DocTestParser().get_examples(text)
    is_error = inspect.isclass(getattr(sk, name)) and issubclass(getattr(sk, name), Exception)
    assert examples or is_error  # The example of an error may be its message.
    for example in examples:
        compile(example.source, name, "single")


@pytest.mark.parametrize("name", NAMES)
def test_a_public_docstring_says_it_in_its_first_line(name):
    first, _, rest = (inspect.getdoc(getattr(sk, name)) or "").partition("\n")
    assert first.endswith(".")
    assert not rest or rest.startswith("\n")
