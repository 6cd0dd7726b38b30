"""What is printed: escaped, bounded, readable."""

from __future__ import annotations

import io
import json
import math
from collections import OrderedDict, deque
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkeep.cli.render import brief, is_json, opaque_names, pretty
from shardkeep.cli.terminal import Output
from shardkeep.types import Opaque
from shardkeep.util.escaping import escape, one_line
from shardkeep.util.formatting import count, human_bytes

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=12,
)


@given(st.text())
def test_nothing_unprintable_is_left_and_nothing_is_lost(text: str) -> None:
    shown = escape(text)
    assert shown.isprintable()
    assert shown.encode("latin-1", "backslashreplace").decode("unicode_escape") == text


@given(st.text(), st.text())
def test_different_names_look_different(one: str, other: str) -> None:
    assert (escape(one) == escape(other)) == (one == other)


def test_escape_sequences_line_breaks_and_direction_marks() -> None:
    assert escape("a\x1b[2J\nb\u202ec\x9b\ud800") == r"a\x1b[2J\nb\u202ec\x9b\ud800"
    assert escape("läyer 0/ü.权重") == "läyer 0/ü.权重"


@given(st.text())
def test_an_error_is_one_printable_line(text: str) -> None:
    assert one_line(text).isprintable()


def test_an_error_does_not_escape_twice() -> None:
    assert one_line(f"tensor {chr(27)!r}:\nbroken") == r"tensor '\x1b': broken"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (5 * 1024**4, "5.0 TiB"),
        (3 * 1024**7, "3072.0 EiB"),
    ],
)
def test_human_sizes(nbytes: int, text: str) -> None:
    assert human_bytes(nbytes) == text


def test_counts() -> None:
    assert [count(n, "file") for n in (0, 1, 12345)] == ["0 files", "1 file", "12,345 files"]


@given(values, st.integers(10, 100))
def test_brief_is_short_and_whole_where_it_fits(value: Any, room: int) -> None:
    text = brief(value, room)
    assert len(text) <= room
    if len(repr(value)) <= room:
        assert text == repr(value)


@given(values)
def test_pretty_shows_every_part_of_a_value(value: Any) -> None:
    text = "".join(line.strip() + " " for line in pretty(value, width=30))
    ends = str.maketrans("", "", " ,()")
    assert text.translate(ends) == repr(value).translate(ends)


def test_pretty_breaks_what_is_long() -> None:
    value = {"betas": (0.9, 0.999), "names": ["layer.weight", "layer.bias"], "empty": {}}
    assert list(pretty(value, width=40)) == [
        "{",
        "  'betas': (0.9, 0.999),",
        "  'names': [",
        "    'layer.weight',",
        "    'layer.bias',",
        "  ],",
        "  'empty': {},",
        "}",
    ]


def test_containers_and_arrays_of_other_kinds() -> None:
    assert brief(OrderedDict(a=1)) == "OrderedDict({'a': 1})"
    assert brief(deque([1, 2])) == "deque([1, 2])"
    assert brief(set()) == "set()"
    assert brief({1}) == "{1}"
    assert brief(frozenset({1})) == "frozenset({1})"
    assert brief(np.arange(3, dtype=np.int32)) == "array([0, 1, 2], int32 [3])"
    assert brief(np.zeros((100, 100))) == "array(float64 [100, 100])"


def test_a_stand_in_is_visible_with_what_it_was_made_of() -> None:
    thing = Opaque("mymodule", "MyClass", (1,), {"size": 3})
    assert brief([thing]) == "[<Opaque mymodule.MyClass>]"
    assert list(pretty(thing)) == [
        "<Opaque mymodule.MyClass>",
        "  called with (1,)",
        "  filled with {'size': 3}",
    ]
    assert opaque_names({"a": [thing, Opaque("a", "B")]}) == ("a.B", "mymodule.MyClass")


def doubled(depth: int) -> Any:
    value: Any = [1]
    for _ in range(depth):
        value = [value, value]
    return value


def test_values_that_stand_for_more_than_any_memory_holds() -> None:
    bomb = doubled(50)
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    round_: list[Any] = []
    round_.append(round_)
    for value in (bomb, deep, round_):
        assert len(brief(value)) <= 72
        assert len(list(pretty(value))) <= 2001
        assert not is_json(value)
        assert opaque_names(value) == ()
    assert brief(10**5000) == "<an integer of 16,610 bits>"
    assert brief(Fraction(1, 10**5000)) == "<Fraction>"
    assert not is_json(10**5000)
    assert len(brief("x" * 10**6, 10**5)) < 21_000


@given(values)
def test_json_holds_exactly_what_it_is_said_to_hold(value: Any) -> None:
    if is_json(value):
        back = json.loads(json.dumps(value))
        assert back == value
        assert type(back) is type(value)
    else:
        assert not _plain(value)


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) for k in value) and all(map(_plain, value.values()))
    if isinstance(value, list):
        return all(map(_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, (tuple, bytes))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Output(io.StringIO()).paint("red", "x") == "x"
    assert Output(Terminal()).paint("red", "x") == "\x1b[31mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert Output(Terminal()).paint("red", "x") == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert Output(Terminal()).paint("red", "x") == "x"
