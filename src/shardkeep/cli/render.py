"""Values as text. They come from checkpoints: nothing here trusts their size, depth or shape."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from shardkeep.types import Opaque

__all__ = ["brief", "is_json", "opaque_names", "pretty"]

_DEEPEST = 60
"""Containers inside one another that are shown: far from Python's own limit on recursion."""

_TEXT = 20_000
"""Characters of one string, or bytes, that are shown."""

_NODES = 100_000
"""Values that are looked at: shared lists of lists can stand for more than any memory holds."""

_INT_BITS = 8192
"""Python refuses to print integers beyond some 14,000 bits: it takes too long."""

_BRACKETS: tuple[tuple[type, str, str], ...] = (
    (OrderedDict, "OrderedDict({", "})"),
    (Mapping, "{", "}"),
    (list, "[", "]"),
    (deque, "deque([", "])"),
    (tuple, "(", ")"),
    (frozenset, "frozenset({", "})"),
    (set, "{", "}"),
)


def brief(value: Any, room: int = 72) -> str:
    """`value` in one line of at most `room` characters, cut with "..." where it is longer."""
    text = ""
    for token in _tokens(value, 0):
        text += token
        if len(text) > room:
            return text[: room - 3] + "..."
    return text


def pretty(value: Any, *, width: int = 88, lines: int = 2000) -> Iterator[str]:
    """`value` over as many lines as it takes, but at most `lines` of them."""
    for number, line in enumerate(_pretty(value, "", "", "", width, 0)):
        if number == lines:
            yield f"... (cut after {lines:,} lines)"
            return
        yield line


def is_json(value: Any) -> bool:
    """Whether JSON holds exactly this value: no tuple, no NaN, no key that is not a string."""
    seen, level = 0, [value]
    for _ in range(_DEEPEST):
        seen += len(level)
        if seen > _NODES or not all(map(_plain, level)):
            return False
        if not level:
            return True
        level = [inner for one in level for inner in _inside(one)]
    return False


def _plain(value: Any) -> bool:
    kind = type(value)
    if kind is dict:
        return len(value) <= _NODES and all(type(key) is str for key in value)
    if kind is float:
        return math.isfinite(value)
    if kind is int:
        return bool(value.bit_length() <= _INT_BITS)
    return value is None or kind in (bool, str) or (kind is list and len(value) <= _NODES)


def _inside(value: Any) -> list[Any]:
    if type(value) is dict:
        return list(value.values())
    return value if isinstance(value, list) else []


def opaque_names(value: Any) -> tuple[str, ...]:
    """Full names of the classes that have stand-ins in `value`, sorted."""
    found: set[str] = set()
    seen: set[int] = set()
    rest = [value]
    while rest and len(seen) < _NODES:
        one = rest.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Opaque):
            found.add(one.name)
            rest += [one.args, one.state]
        elif isinstance(one, Mapping):
            rest += [*one, *one.values()]
        elif isinstance(one, (list, tuple, set, frozenset, deque)):
            rest += one
    return tuple(sorted(found))


def _pretty(value: Any, indent: str, head: str, tail: str, width: int, depth: int) -> Iterator[str]:
    room = max(width - len(indent) - len(head) - len(tail), 24)
    inside, opening, closing = _parts(value)
    text = brief(value, room if inside else _TEXT)
    cut = text.endswith("...") or isinstance(value, Opaque)
    if not inside or not cut or depth >= _DEEPEST:
        yield f"{indent}{head}{text}{tail}"
        return
    yield f"{indent}{head}{opening}"
    for label, part in inside:
        yield from _pretty(part, indent + "  ", label, "," if closing else "", width, depth + 1)
    if closing:
        yield f"{indent}{closing}{tail}"


def _parts(value: Any) -> tuple[list[tuple[str, Any]], str, str]:
    """Return the parts of a value (label and value), and the text before and after them."""
    if isinstance(value, Opaque):
        inside = [("called with ", value.args)] if value.args else []
        state = [("filled with ", value.state)] if value.state is not None else []
        return inside + state, repr(value), ""
    known = _brackets(value)
    if known is None:
        return [], "", ""
    if isinstance(value, Mapping):
        return [(f"{brief(key, _TEXT)}: ", entry) for key, entry in value.items()], *known[1:]
    return [("", entry) for entry in value], *known[1:]


def _brackets(value: Any) -> tuple[type, str, str] | None:
    return next((entry for entry in _BRACKETS if isinstance(value, entry[0])), None)


def _tokens(value: Any, depth: int) -> Iterator[str]:
    """The parts of `value`'s text, made as they are asked for: the caller stops where it likes."""
    known = _brackets(value)
    if known is None or (not value and known[0] is set):
        yield _atom(value)
        return
    kind, opening, closing = known
    yield opening
    if depth >= _DEEPEST:
        yield "..." + closing
        return
    for number, entry in enumerate(value):
        yield ", " if number else ""
        yield from _tokens(entry, depth + 1)
        if isinstance(value, Mapping):
            yield ": "
            yield from _tokens(value[entry], depth + 1)
    yield ("," if kind is tuple and len(value) == 1 else "") + closing


def _atom(value: Any) -> str:
    if isinstance(value, (str, bytes, bytearray)):
        cut = "..." if len(value) > _TEXT else ""
        return repr(value[:_TEXT]) + cut
    if isinstance(value, np.ndarray):
        shown = f"{value.dtype} {list(value.shape)}"
        short = value.size <= 8 and not value.dtype.hasobject
        return f"array({value.tolist()}, {shown})" if short else f"array({shown})"
    if isinstance(value, int) and value.bit_length() > _INT_BITS:
        return f"<an integer of {value.bit_length():,} bits>"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers with too many digits, inside a fraction
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _TEXT else text[:_TEXT] + "..."
