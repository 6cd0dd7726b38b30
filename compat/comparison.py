"""Compare two descriptions of a state, node by node.

The kinds of nodes are listed in tests/golden/README.md. A reader that runs inside another release
only describes what it has loaded, so that one comparison, here, judges all of them. This module
needs neither torch nor shardkeep.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Node = Mapping[str, Any]

CONTAINERS = ("dict", "list", "tuple")


@dataclass(frozen=True)
class Difference:
    """A difference from what was saved, and its place."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass(frozen=True)
class Comparison:
    """The number of compared leaves, and the differences."""

    leaves: int
    differences: tuple[Difference, ...]


def compare(expected: Node, actual: Node, *, text_keys: bool = False) -> Comparison:
    """Compare two descriptions leaf by leaf, bit by bit.

    Args:
        expected: the description of the saved state.
        actual: the description of the loaded state.
        text_keys: whether the loaded state was nested by the checkpoint's own paths, not by a
            template: stock torch then turns keys into text and drops empty containers.
    """
    found = list(_walk(expected, actual, "", text_keys))
    return Comparison(len(found), tuple(one for one in found if one is not None))


def leaves(node: Node) -> int:
    """Return the number of leaves of a description: nodes that are neither a dict nor a list."""
    if node["kind"] == "dict":
        return sum(leaves(value) for _, value in node["items"])
    if node["kind"] == "list":
        return sum(map(leaves, node["items"]))
    return 1


def _walk(expected: Node, actual: Node, path: str, text_keys: bool) -> Iterator[Difference | None]:
    if expected["kind"] == "dict" and actual["kind"] == "dict":
        yield from _mapping(expected, actual, path, text_keys)
    elif (
        expected["kind"] == "list"
        and actual["kind"] == "list"
        and len(expected["items"]) == len(actual["items"])
    ):
        pairs = zip(expected["items"], actual["items"], strict=True)
        for i, (want, have) in enumerate(pairs):
            yield from _walk(want, have, f"{path}[{i}]", text_keys)
        if not expected["items"]:
            yield None
    else:
        same = _same(expected, actual)
        yield None if same else Difference(path, f"{_shown(actual)}, not {_shown(expected)}")


def _mapping(
    expected: Node, actual: Node, path: str, text_keys: bool
) -> Iterator[Difference | None]:
    """Compare the items of mappings, whose classes may differ."""
    have = {_key(key, text_keys): value for key, value in actual["items"]}
    for key, want in expected["items"]:
        here = f"{path}[{_shown(key)}]"
        found = have.pop(_key(key, text_keys), None)
        if found is not None:
            yield from _walk(want, found, here, text_keys)
        elif not (text_keys and _holds_nothing(want)):
            yield Difference(here, "missing")
    for key in have:
        yield Difference(f"{path}[{key}]", "not expected")


def _holds_nothing(node: Node) -> bool:
    return node["kind"] == "dict" and all(_holds_nothing(value) for _, value in node["items"])


def _key(node: Node, as_text: bool) -> str:
    if not as_text:
        return json.dumps(node, sort_keys=True)
    if node["kind"] == "tuple":
        return str(tuple(item["value"] for item in node["items"]))
    if node["kind"] == "bytes":
        return str(base64.b64decode(node["data"]))
    return str(node.get("value"))


def _same(expected: Node, actual: Node) -> bool:
    if expected["kind"] != actual["kind"]:
        return False
    if expected["kind"] in ("ndarray", "numpy_scalar"):
        return _array(expected) == _array(actual)
    if expected["kind"] in CONTAINERS:
        if expected.get("type") != actual.get("type"):
            return False
        return len(expected["items"]) == len(actual["items"]) and all(
            _same_pair(want, have)
            for want, have in zip(expected["items"], actual["items"], strict=True)
        )
    # As text, NaN equals itself and 0.0 differs from -0.0.
    return json.dumps(expected, sort_keys=True) == json.dumps(actual, sort_keys=True)


def _same_pair(want: Any, have: Any) -> bool:
    """Return the items of a sequence, or the pairs of key and value of a mapping."""
    if isinstance(want, list):
        return _same(want[0], have[0]) and _same(want[1], have[1])
    return _same(want, have)


def _array(node: Node) -> tuple[str, list[int], bytes]:
    """Return the dtype, the shape and the bytes in one byte order.

    numpy may swap the byte order while unpickling.
    """
    dtype = np.dtype(node["dtype"])
    little = dtype.newbyteorder("<")
    data = np.frombuffer(base64.b64decode(node["data"]), dtype).astype(little).tobytes()
    return little.str, node["shape"], data


def _shown(node: Node) -> str:
    """Return a short text of a node."""
    if node["kind"] == "value":
        return repr(node["value"])
    if node["kind"] == "tensor":
        data = base64.b64decode(node["data"])
        return f"{node['dtype']}{node['shape']} {data[:8].hex()}{'…' if len(data) > 8 else ''}"
    if "items" in node:
        return f"{node['kind']} of {len(node['items'])}"
    text = json.dumps(node)
    return text if len(text) < 80 else text[:80] + "…"
