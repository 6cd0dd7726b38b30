"""Compare the state that a golden checkpoint contains with its `expected.json`.

This works without torch: tensors are then numpy arrays.
"""

from __future__ import annotations

import base64
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardkeep.types import DType, Opaque, TensorInfo

__all__ = ["Comparison", "compare", "contents", "template"]

Node = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """The number of compared leaves, and the differences, one line each."""

    leaves: int
    differences: tuple[str, ...]

    @property
    def same(self) -> bool:
        return not self.differences


def compare(expected: Node, actual: Any, *, typed_keys: bool = False) -> Comparison:
    """Compare leaf by leaf, bit by bit.

    Args:
        expected: a node of `expected.json`.
        actual: a nested state with arrays, tensors and values.
        typed_keys: whether the key "0" differs from 0; stock torch turns all keys into strings on
            saving.
    """
    found = list(_walk(expected, actual, "", not typed_keys))
    return Comparison(len(found), tuple(line for line in found if line))


def contents(checkpoint: Any) -> Any:
    """Return a whole checkpoint as a nested state, its tensors read as numpy arrays."""
    return _read(checkpoint, checkpoint.tree())


def _read(checkpoint: Any, node: Any) -> Any:
    if isinstance(node, TensorInfo):
        return checkpoint.read(node.name)
    if type(node) in (dict, OrderedDict):
        return type(node)((key, _read(checkpoint, value)) for key, value in node.items())
    return [_read(checkpoint, value) for value in node] if isinstance(node, list) else node


def _walk(expected: Node, actual: Any, path: str, lenient: bool) -> Iterator[str]:
    kind = expected["kind"]
    if kind == "dict":
        yield from _mapping(expected, actual, path, lenient)
    elif kind in ("list", "tuple"):
        yield from _sequence(expected, actual, path, lenient)
    elif kind == "set":
        yield _set(expected, actual, path)
    else:
        yield _LEAVES[kind](expected, actual, path)


def _mapping(expected: Node, actual: Any, path: str, lenient: bool) -> Iterator[str]:
    items = [(plain(key), value) for key, value in expected["items"]]
    if not isinstance(actual, Mapping):
        # DCP drops empty mappings, so an empty container may be missing altogether.
        yield "" if actual is MISSING and not items else f"{path}: {actual!r} is not a mapping"
        return
    for key, value in items:
        here = f"{path}[{key!r}]"
        if key in actual:
            yield from _walk(value, actual[key], here, lenient)
        elif lenient and str(key) in actual:
            yield from _walk(value, actual[str(key)], here, lenient)
        else:
            yield from _walk(value, MISSING, here, lenient)
    known = {str(key) for key, _ in items}
    yield from (f"{path}[{key!r}]: not expected" for key in actual if str(key) not in known)


def _sequence(expected: Node, actual: Any, path: str, lenient: bool) -> Iterator[str]:
    want: type[Any] = list if expected["kind"] == "list" else tuple
    if not isinstance(actual, want) or len(actual) != len(expected["items"]):
        yield f"{path}: {actual!r} is not a {want.__name__} of {len(expected['items'])}"
        return
    yield ""
    for i, (node, value) in enumerate(zip(expected["items"], actual, strict=True)):
        yield from _walk(node, value, f"{path}[{i}]", lenient)


def _set(expected: Node, actual: Any, path: str) -> str:
    want = {plain(item) for item in expected["items"]}
    fits = type(actual).__name__ == expected["type"] and set(actual) == want
    return "" if fits else f"{path}: {actual!r}, not {want!r}"


def _tensor(expected: Node, actual: Any, path: str) -> str:
    if actual is MISSING:
        return f"{path}: missing"
    dtype, shape, data = _tensor_bytes(actual)
    if dtype is not None and dtype != expected["dtype"]:
        return f"{path}: {dtype}, not {expected['dtype']}"
    if list(shape) != expected["shape"]:
        return f"{path}: shape {list(shape)}, not {expected['shape']}"
    same = data == base64.b64decode(expected["data"])
    return "" if same else f"{path}: other bytes"


def _tensor_bytes(value: Any) -> tuple[str | None, tuple[int, ...], bytes]:
    """Return dtype, shape and bytes; the dtype is None if numpy's does not identify torch's."""
    if isinstance(value, np.ndarray | np.generic):
        name = value.dtype.name
        known = name if _is_plain(name) else None
        return known, value.shape, np.ascontiguousarray(value).tobytes()
    if hasattr(value, "detach"):
        import torch

        whole = value.full_tensor() if hasattr(value, "full_tensor") else value.detach()
        name = str(whole.dtype).removeprefix("torch.")
        if whole.is_quantized:
            whole = whole.int_repr()
        raw = whole.cpu().resolve_conj().resolve_neg().contiguous()
        words = raw.reshape(-1).view(torch.uint8)
        return name, tuple(value.shape), words.numpy().tobytes()
    return type(value).__name__, (), b""


def _is_plain(name: str) -> bool:
    try:
        dtype = DType.named(name)
    except Exception:
        return False
    # numpy uses each of these for several dtypes of torch, so the name is not compared.
    return not dtype.note and name not in ("uint8", "uint16", "int8", "int32")


def _array(expected: Node, actual: Any, path: str) -> str:
    if not isinstance(actual, np.ndarray | np.generic):
        return f"{path}: {type(actual).__name__}, not a numpy array"
    data = base64.b64decode(expected["data"])
    want = np.frombuffer(data, expected["dtype"]).reshape(expected["shape"])
    # The byte order is part of the representation, not of the values.
    same = actual.shape == want.shape and actual.dtype.newbyteorder("<") == want.dtype.newbyteorder(
        "<"
    )
    return (
        ""
        if same and want.tobytes() == actual.astype(want.dtype).tobytes()
        else f"{path}: another array"
    )


def _value(expected: Node, actual: Any, path: str) -> str:
    want = expected["value"]
    if type(actual).__name__ != expected["type"]:
        return f"{path}: {type(actual).__name__} {actual!r}, not {expected['type']} {want!r}"
    if isinstance(want, float) and isinstance(actual, float):
        same = want == actual and math.copysign(1, want) == math.copysign(1, actual)
        same = same or (math.isnan(want) and math.isnan(actual))
    else:
        same = want == actual
    return "" if same else f"{path}: {actual!r}, not {want!r}"


def _bytes(expected: Node, actual: Any, path: str) -> str:
    want = base64.b64decode(expected["data"])
    kind = expected.get("type", "bytes")
    fits = type(actual).__name__ == kind and bytes(actual) == want
    return "" if fits else f"{path}: {actual!r}, not {kind} {want!r}"


def _size(expected: Node, actual: Any, path: str) -> str:
    fits = isinstance(actual, tuple) and list(actual) == expected["items"]
    return "" if fits else f"{path}: {actual!r}, not a size {expected['items']}"


def _opaque(expected: Node, actual: Any, path: str) -> str:
    name = expected["class"]
    if isinstance(actual, Opaque) and actual.name == name:
        return ""
    return f"{path}: {actual!r}, not the stand-in of {name}"


def _repr(expected: Node, actual: Any, path: str) -> str:
    """Compare values of library classes; without torch, its own are stand-ins."""
    want, name = expected["value"], expected["type"]
    shown = {repr(actual), str(actual), f"torch.{actual}"}
    if isinstance(actual, Opaque) and (name.startswith("torch.") or actual.name == name):
        return ""
    if isinstance(actual, Opaque) and name.startswith("builtins."):
        # A class or function that is not known to be safe is only read as a name.
        return "" if actual.qualname in want else f"{path}: {actual!r}, not {want}"
    if hasattr(actual, "parts"):
        shown.add(want if str(actual) == want.split("'")[1] else "")
    return "" if want in shown else f"{path}: {actual!r}, not {want}"


class _Missing:
    def __repr__(self) -> str:
        return "missing"


MISSING = _Missing()

_LEAVES: Mapping[str, Callable[[Node, Any, str], str]] = {
    "tensor": _tensor,
    "ndarray": _array,
    "numpy_scalar": _array,
    "value": _value,
    "bytes": _bytes,
    "size": _size,
    "opaque": _opaque,
    "repr": _repr,
}


def plain(node: Node) -> Any:
    """Return the Python value of a node that is a key or a member of a set."""
    if node["kind"] == "tuple":
        return tuple(plain(item) for item in node["items"])
    if node["kind"] == "bytes":
        return base64.b64decode(node["data"])
    return node["value"]


def template(node: Node) -> Any:
    """Return a state for a load to fill: empty tensors, and values that the load must replace.

    This needs torch, and a torch that has all the dtypes; see `known_here`.
    """
    import torch

    kind = node["kind"]
    if kind == "dict":
        return {plain(key): template(value) for key, value in node["items"]}
    if kind == "list":
        return [template(item) for item in node["items"]]
    if kind == "tuple":
        return tuple(template(item) for item in node["items"])
    if kind == "tensor":
        dtype = getattr(torch, node["dtype"])
        if "quantizer" in node:
            return torch.quantize_per_tensor(torch.zeros(node["shape"]), 1.0, 0, dtype)
        nbytes = len(base64.b64decode(node["data"]))
        return torch.zeros(nbytes, dtype=torch.uint8).view(dtype).reshape(node["shape"])
    return "to be replaced"


def known_here(node: Node) -> dict[str, Any]:
    """Return the mapping without entries that need a dtype which the running torch lacks."""
    items = [
        (key, known_here(value) if value["kind"] == "dict" else value)
        for key, value in node["items"]
        if not _lacks(value)
    ]
    return {**node, "items": items}


def _lacks(node: Node) -> bool:
    import torch

    if node["kind"] == "tensor":
        return not hasattr(torch, node["dtype"])
    return node["kind"] in ("list", "tuple") and any(map(_lacks, node["items"]))
