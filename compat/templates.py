"""Templates for a load on any torch from 2.0 on: `expected.json` with every bit inverted.

Imported by scripts that run inside other releases; needs torch but not shardkeep.
"""

from __future__ import annotations

import base64
import io
import itertools
import pathlib
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "tests" / "golden"
sys.path.insert(0, str(GOLDEN))

import make as golden  # noqa: E402
import torch  # noqa: E402

__all__ = [
    "Judge",
    "Node",
    "Spread",
    "Template",
    "golden",
    "known",
    "lacks",
    "settle",
    "storable",
    "template",
    "unreadable",
]

Node = dict[str, Any]
Spread = Callable[[str, torch.Tensor], Any]
"""Name and value of a tensor -> its shard on this rank, or None for a whole tensor."""

Judge = Callable[[str], str | None]
"""Name of a dtype -> why this release cannot have tensors of it; None if it can."""


SENTINEL = "to be replaced"
"""The placeholder for a plain value in templates."""


class _Absent:
    """The names of what this release cannot hold."""


ABSENT = _Absent()


@dataclass
class Template:
    """A state to be filled, with the values that are expected."""

    state: Any
    expected: Node
    """The expected result: that of the case, without what this release cannot hold."""
    left_out: list[str]
    truths: list[tuple[Any, Any, Node]]
    """Sharded tensors: the template, the same with the true values, and the whole tensor's node."""


def template(expected: Node, judge: Judge, spread: Spread | None = None) -> Template:
    """Return a template for a whole state; every bit of its tensors is wrong."""
    made = Template(None, {}, [], [])
    state, pruned = _template(expected, "", made, judge, spread)
    made.state, made.expected = state, pruned
    return made


def _template(
    node: Node, path: str, into: Template, judge: Judge, spread: Spread | None
) -> tuple[Any, Node]:
    kind = node["kind"]
    if kind == "dict":
        pairs = []
        state: Any = OrderedDict() if node["type"] == "OrderedDict" else {}
        for key, value in node["items"]:
            inner, pruned = _template(value, f"{path}.{_text(key)}", into, judge, spread)
            if inner is not ABSENT:
                state[plain(key)] = inner
                pairs.append([key, pruned])
        return state, {**node, "items": pairs}
    if kind == "list" and _is_walked(node) and not lacks(node, judge):
        items = [
            _template(item, f"{path}.{i}", into, judge, spread)
            for i, item in enumerate(node["items"])
        ]
        return [state for state, _ in items], {**node, "items": [pruned for _, pruned in items]}
    lacking = lacks(node, judge)
    if lacking:
        into.left_out.append(f"{path[1:]}: {lacking}")
        return ABSENT, node
    if kind == "tensor" and "quantizer" not in node:
        truth = tensor_of(node)
        part = spread(path, truth) if spread else None
        if part is None:
            return inverted(truth), node
        blank = spread(path, inverted(truth))
        into.truths.append((blank, part, node))
        return blank, node
    return SENTINEL, node


def _is_walked(node: Node) -> bool:
    return any(item["kind"] in ("tensor", "dict", "list") for item in node["items"])


def known(name: str) -> str | None:
    """Return None if the dtype exists in this release, otherwise the reason."""
    return None if hasattr(torch, name) else f"no torch.{name}"


def storable(name: str) -> str | None:
    """Return None if this release can save and load the dtype, otherwise the reason."""
    if not hasattr(torch, name) or name.startswith("q"):
        return known(name)  # quantized ones are objects: every release saves those that it has
    file = io.BytesIO()
    try:
        torch.save(torch.empty(2, dtype=getattr(torch, name)), file)
        file.seek(0)
        torch.load(file)
    except Exception:
        return f"torch.{name} cannot be saved by this release itself"
    return None


def lacks(node: Any, judge: Judge) -> str | None:
    """Return why this release cannot have some tensor of a node, or None."""
    if isinstance(node, dict):
        if node.get("kind") == "tensor":
            return judge(node["dtype"])
        return next(filter(None, (lacks(part, judge) for part in node.values())), None)
    if isinstance(node, (list, tuple)):
        return next(filter(None, (lacks(part, judge) for part in node)), None)
    return None


def tensor_of(node: Node) -> torch.Tensor:
    """Return the tensor that a node describes."""
    data = bytearray(base64.b64decode(node["data"]))
    dtype = getattr(torch, node["dtype"])
    if not data:
        return torch.empty(node["shape"], dtype=dtype)
    raw = torch.frombuffer(data, dtype=torch.uint8).clone()
    packed = node["dtype"].startswith("float4")
    return (
        raw.view(dtype).reshape(node["shape"])
        if not packed
        else raw.view(dtype).view(node["shape"])
    )


def inverted(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with every bit inverted, so that unwritten elements are detected."""
    if tensor.dtype == torch.bool:
        return ~tensor
    if not tensor.numel():
        return tensor.clone()
    raw = tensor.reshape(-1).view(torch.uint8)
    return (255 - raw).view(tensor.dtype).reshape(tensor.shape)


def plain(node: Node) -> Any:
    """Return the Python value of a node that is a key."""
    if node["kind"] == "tuple":
        return tuple(plain(item) for item in node["items"])
    return base64.b64decode(node["data"]) if node["kind"] == "bytes" else node["value"]


def _text(node: Node) -> str:
    return str(plain(node))


def unreadable(expected: Node, judge: Judge) -> str | None:
    """Return why this release cannot load some tensor of a checkpoint, or None.

    A dtype that the release lacks makes the checkpoint's metadata unreadable for it. In an object,
    only the object cannot be loaded.
    """
    if expected["kind"] in ("dict", "list"):
        items = expected["items"]
        inner = [value for _, value in items] if expected["kind"] == "dict" else items
        return next(filter(None, (unreadable(value, judge) for value in inner)), None)
    if expected["kind"] != "tensor" or "quantizer" in expected:
        return None
    return judge(expected["dtype"]) or cannot_copy(expected["dtype"])


def cannot_copy(name: str) -> str | None:
    """Return why tensors of a dtype cannot be copied, as a load must do, or None."""
    dtype = getattr(torch, name)
    try:
        torch.empty(2, dtype=dtype).copy_(torch.empty(2, dtype=dtype))
    except (NotImplementedError, RuntimeError):
        return f"torch.{name} cannot be copied"
    return None


def settle(blank: Any, loaded: Any) -> tuple[Any, int]:
    """Move objects that stock torch has loaded under the text of an integer key to the key.

    Args:
        blank: the template, as it was before the load.
        loaded: the state after it.

    Returns:
        The state, and the number of corrected containers.
    """
    if isinstance(blank, dict) and isinstance(loaded, dict):
        result: Any = {}
        moved = 0
        texts = {str(key) for key in blank if not isinstance(key, str)} - set(blank)
        for key, value in loaded.items():
            if key in texts:
                continue
            mended = not isinstance(key, str) and str(key) in texts and str(key) in loaded
            whole = _merge(value, loaded[str(key)]) if mended else value
            result[key], more = settle(blank.get(key), whole)
            moved += more + mended
        return result, moved
    if isinstance(blank, list) and isinstance(loaded, list) and len(blank) == len(loaded):
        pairs = [settle(a, b) for a, b in zip(blank, loaded, strict=True)]
        return [value for value, _ in pairs], sum(moved for _, moved in pairs)
    return loaded, 0


def _merge(at_key: Any, beside: Any) -> Any:
    """Return the value of a key, with its placeholders replaced by what was loaded beside it."""
    if isinstance(at_key, str) and at_key == SENTINEL:
        return beside
    if isinstance(at_key, dict) and isinstance(beside, dict):
        texts = {str(key): key for key in at_key}
        merged = dict(at_key)
        for key, value in beside.items():
            own = texts.get(str(key), key)
            merged[own] = _merge(at_key.get(own, SENTINEL), value)
        return merged
    if isinstance(at_key, list) and isinstance(beside, list):
        pairs = itertools.zip_longest(at_key, beside[: len(at_key)])
        return [_merge(a, b) for a, b in pairs]
    return at_key
