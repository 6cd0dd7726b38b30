"""`.metadata` files as torch's own metadata classes, without running their pickle.

What comes out is what `pickle.load` would have given, defaults of old releases included. Other
classes than those that metadata is made of are built if they are trusted, and else refused.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as Legacy
from torch.distributed.checkpoint import metadata as stock
from torch.distributed.checkpoint.filesystem import _StorageInfo

from shardkeep.dcp.bridge.trust import trusted
from shardkeep.errors import FormatError, Mismatch, Untrusted
from shardkeep.format.pickle.reader import loads
from shardkeep.format.pickle.registry import (
    Builder,
    Limits,
    Registry,
    check_nesting,
    opaque_classes,
)
from shardkeep.torch_state.builders import TORCH_BUILDERS
from shardkeep.torch_state.trusted import TrustedClasses
from shardkeep.types import DType

__all__ = ["metadata_in"]

_LIMITS = Limits()
_PACKAGES = ("torch.distributed.checkpoint", "torch.distributed._shard.checkpoint")
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"
_CLASSES = """
    Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata MetadataIndex
    TensorProperties StorageMeta
""".split()
_FORMATS = (torch.contiguous_format, torch.channels_last, torch.preserve_format)
_ENCODINGS = [
    f"{_SHARDED}.MEM_FORMAT_ENCODING",
    *(f"{package}.metadata.{name}" for package in _PACKAGES
      for name in ("_MEM_FORMAT_ENCODING", "MEM_FORMAT_ENCODING")),
]  # fmt: skip
_FLAT = frozenset(
    map(type, (None, "", 0, False, torch.Size(), torch.float, torch.strided, *_FORMATS))
)
"""Types of values that hold no others but numbers."""
_PROPERTIES = ("dtype", "layout", "requires_grad", "memory_format", "pin_memory", "strides")


def metadata_in(data: bytes, *, file: str) -> Any:
    """The value of a metadata file; mostly a `Metadata`.

    Args:
        data: the file; what follows the pickle is not looked at.
        file: names it in errors.

    Raises:
        Untrusted: it holds classes that metadata is not made of, and that are not trusted.
        FormatError: it is broken or hostile.
        Mismatch: a tensor's dtype is one that this torch does not have.
    """
    value, found = _read(data, file, lambda state: state)
    if not found:
        return value
    allowed = TrustedClasses(file, trusted())
    left = tuple(name for name in found if not allowed.covers(name))
    if left:
        raise Untrusted(file, left)
    value, _ = _read(data, file, allowed.resolve, allowed.builders(found))
    return allowed.resolve(value)


def _read(
    data: bytes, file: str, resolve: Callable[[Any], Any], more: Registry | None = None
) -> tuple[Any, tuple[str, ...]]:
    """The value, and the full names of the classes in it that were only stood for."""
    found: dict[str, None] = {}

    def fill(node: Any, state: Any) -> None:
        if vars(node):
            raise FormatError("metadata that is filled twice")
        if type(state) is not dict or not set(map(type, state)) <= {str}:
            raise FormatError(f"a {type(node).__name__} without its attributes")
        # Metadata is a leaf to whoever looks for nesting and stand-ins: that is done here.
        if not set(map(type, state.values())) <= flat:
            check_nesting(state, _LIMITS.depth, _LIMITS.parts + 16 * len(data))
            found.update(dict.fromkeys(opaque_classes(state)))
        vars(node).update(resolve(state))

    def fill_key(node: Any, state: Any) -> None:
        """Keys are hashed and compared: only plain names and numbers may be in them."""
        name, offset, index = map(dict(state).get, ("fqn", "offset", "index"))
        plain = offset is None or (isinstance(offset, tuple) and set(map(type, offset)) <= {int})
        if type(name) is not str or not plain or type(index) not in (int, type(None)):
            raise FormatError("a key without name or offsets")
        fill(node, state)

    def fill_properties(node: Any, state: Any) -> None:
        """Five properties, and a sixth from 2.15 on, whatever this release expects."""
        if type(state) is tuple and len(state) >= 5:
            state = dict(zip(_PROPERTIES, state, strict=False))
            if state["memory_format"] not in _FORMATS:
                raise FormatError("a tensor without a memory format")
            if type(state["dtype"]) is DType:
                raise Mismatch(f"torch {torch.__version__} has no dtype {state['dtype']}")
            if "strides" in state and not hasattr(node, "strides"):
                del state["strides"]
        fill(node, state)

    fills = {"MetadataIndex": fill_key, "TensorProperties": fill_properties}
    kinds = {
        name: Builder(kind, new=_empty(kind), type=kind, fill=fills.get(kind.__name__, fill),
                      key=kind is stock.MetadataIndex)
        for name, kind in _named()
    }  # fmt: skip
    flat = _FLAT.union(builder.type for builder in kinds.values())
    value = loads(data, Registry({**TORCH_BUILDERS, **(more or {}), **_VALUES, **kinds}), file=file)
    found.update(dict.fromkeys(opaque_classes(value)))
    return value, tuple(found)


def _empty(kind: type) -> Callable[..., Any]:
    def new(*args: Any) -> Any:
        if args:
            raise FormatError(f"a {kind.__name__} that is made of something")
        return object.__new__(kind)

    return new


def _named() -> Iterator[tuple[str, type]]:
    """The classes that metadata is made of, by all their names so far."""
    for package in _PACKAGES:
        for name in _CLASSES:
            if hasattr(stock, name):
                yield f"{package}.metadata.{name}", getattr(stock, name)
        for module in ("filesystem", "_fsspec_filesystem", "fsspec_filesystem"):
            yield f"{package}.{module}._StorageInfo", _StorageInfo
    yield f"{_SHARDED}.TensorProperties", Legacy


def _format(number: Any = 0) -> torch.memory_format:
    """The pickle has a number for it."""
    if type(number) is not int or not 0 <= number < len(_FORMATS):
        raise FormatError("a memory format that is none")
    return _FORMATS[number]


def _path(*parts: Any) -> Any:
    if not all(type(part) is str for part in parts):
        raise FormatError("a path that is not made of text")
    return pathlib.Path(*parts)


_HERE = type(pathlib.Path()).__name__
_VALUES = {
    **{name: Builder(_format) for name in _ENCODINGS},
    # Making a path touches no file; those of the other system stay pure.
    **{
        f"{module}.{_HERE}": Builder(_path, type=type(pathlib.Path()), key=True)
        for module in ("pathlib", "pathlib._local")
    },
}
