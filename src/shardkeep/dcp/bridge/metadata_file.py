"""Reading of `.metadata` files into torch's own classes, without executing their pickle.

The result is what `pickle.load` returns, including the defaults of old releases. Classes that
torch's metadata does not consist of are built if the job trusts them, and refused otherwise.
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
"""Types of values that contain nothing but numbers."""
_PROPERTIES = ("dtype", "layout", "requires_grad", "memory_format", "pin_memory", "strides")


def metadata_in(data: bytes, *, file: str) -> Any:
    """Return the value in a metadata file; normally a `Metadata`.

    Args:
        data: the bytes of the file; what follows the pickle is ignored.
        file: its name, for errors.

    Raises:
        Untrusted: it holds classes of the user's own that the job does not trust.
        FormatError: it is malformed or hostile.
        Mismatch: this release of torch lacks the dtype of a tensor.
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
    """Return the value, and the full names of the classes that only have a placeholder in it."""
    found: dict[str, None] = {}

    def fill(node: Any, state: Any) -> None:
        if vars(node):
            raise FormatError(f"the pickle sets the attributes of a {type(node).__name__} twice")
        if type(state) is not dict or not set(map(type, state)) <= {str}:
            raise FormatError(
                f"the state of a {type(node).__name__} is a {type(state).__name__} instead of a "
                "dictionary of attributes"
            )
        # The reader does not look inside of metadata: nesting and placeholders are checked here.
        if not set(map(type, state.values())) <= flat:
            check_nesting(state, _LIMITS.depth, _LIMITS.parts + 16 * len(data))
            found.update(dict.fromkeys(opaque_classes(state)))
        vars(node).update(resolve(state))

    def fill_key(node: Any, state: Any) -> None:
        """Fill a key, which will be hashed: it may hold only plain names and numbers."""
        name, offset, index = map(dict(state).get, ("fqn", "offset", "index"))
        plain = offset is None or (isinstance(offset, tuple) and set(map(type, offset)) <= {int})
        if type(name) is not str or not plain or type(index) not in (int, type(None)):
            raise FormatError("a MetadataIndex has no valid name, offset or index")
        fill(node, state)

    def fill_properties(node: Any, state: Any) -> None:
        """Fill tensor properties: five, or six from 2.15 on, whatever this release expects."""
        if type(state) is tuple and len(state) >= 5:
            state = dict(zip(_PROPERTIES, state, strict=False))
            if state["memory_format"] not in _FORMATS:
                raise FormatError(f"{state['memory_format']!r} is not a memory format")
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
            raise FormatError(f"the pickle creates a {kind.__name__} with arguments; it has none")
        return object.__new__(kind)

    return new


def _named() -> Iterator[tuple[str, type]]:
    """Yield the classes that metadata consists of, under all names that they have had."""
    for package in _PACKAGES:
        for name in _CLASSES:
            if hasattr(stock, name):
                yield f"{package}.metadata.{name}", getattr(stock, name)
        for module in ("filesystem", "_fsspec_filesystem", "fsspec_filesystem"):
            yield f"{package}.{module}._StorageInfo", _StorageInfo
    yield f"{_SHARDED}.TensorProperties", Legacy


def _format(number: Any = 0) -> torch.memory_format:
    """Return the memory format of a number in a pickle."""
    if type(number) is not int or not 0 <= number < len(_FORMATS):
        raise FormatError(f"{number!r} is not the number of a memory format")
    return _FORMATS[number]


def _path(*parts: Any) -> Any:
    if not all(type(part) is str for part in parts):
        raise FormatError("the parts of a path are not all text")
    return pathlib.Path(*parts)


_HERE = type(pathlib.Path()).__name__
_VALUES = {
    **{name: Builder(_format) for name in _ENCODINGS},
    # Creating a path accesses no file. Paths of the other operating system are not created.
    **{
        f"{module}.{_HERE}": Builder(_path, type=type(pathlib.Path()), key=True)
        for module in ("pathlib", "pathlib._local")
    },
}
