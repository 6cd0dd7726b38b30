"""Tensors as `torch.save` describes them: a storage, and the tensor's layout in it.

The functions of `torch._utils` that a container's pickle names are reproduced here on plain values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from shardkeep.errors import FormatError
from shardkeep.format.excerpt import shown
from shardkeep.format.pickle.registry import Builder, Reference
from shardkeep.types import DTYPES, MAX_DIMS, DType, Opaque

__all__ = ["REBUILD", "Record", "Storage", "StorageKind", "StoredTensor", "persistent_storage"]

Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """A file inside a zip.

    Attributes:
        name: its name in the zip, with its folder.
        offset: position of its first byte, relative to the item.
        nbytes: stored bytes; torch never compresses records.
        crc32: CRC-32 of its bytes.
    """

    name: str
    offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a container, with the location of its elements.

    Attributes:
        dtype: element type.
        shape: sizes, in elements.
        strides: steps, in elements; not negative, 0 for repeated elements.
        start: position of element (0, 0, ...), in bytes, relative to the item.
        record: the storage that contains it, and possibly more than it.
        requires_grad: as it was saved.
        conj, neg: whether the elements are stored conjugated, or negated.
        quantizer: scheme, scale(s), zero point(s) and axis of a quantized tensor.
        note: anything else about the stored form, for people.
    """

    dtype: DType
    shape: Ints
    strides: Ints
    start: int
    record: Record
    requires_grad: bool = False
    conj: bool = False
    neg: bool = False
    quantizer: tuple[Any, ...] | None = None
    note: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of its elements, each counted as often as it appears."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StorageKind:
    """A storage class of torch; `dtype` is None if it only counts bytes."""

    dtype: DType | None


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage that a pickle refers to.

    Attributes:
        kind: its class.
        count: its length, in elements of its dtype (in bytes without one).
        record: the record of its bytes.
        finish: converts a tensor in it to the final value.
    """

    kind: StorageKind
    count: int
    record: Record
    finish: Callable[[StoredTensor], Any]

    @property
    def nbytes(self) -> int:
        return self.count * (self.kind.dtype.itemsize if self.kind.dtype else 1)


def persistent_storage(
    key: Any, record: Callable[[str], Record], finish: Callable[[StoredTensor], Any]
) -> Storage:
    """Resolve a persistent id of `torch.save` to a storage.

    Args:
        key: ("storage", class, name of the record, device, number of elements).
        record: finds a record by name.
        finish: converts tensors in it to the final values.
    """
    if type(key) is not tuple or len(key) != 5 or key[0] != "storage":
        raise FormatError("a persistent id that is not a storage")
    _, kind, name, device, count = key
    if type(kind) is not StorageKind:
        raise FormatError(f"a storage of unknown class {shown(getattr(kind, 'name', kind))}")
    if type(name) is not str or type(device) is not str or not _counts(count):
        raise FormatError("a storage has an invalid name, device or length")
    found = record(name)
    storage = Storage(kind, count, found, finish)
    if storage.nbytes > found.nbytes:
        what = f"holds {found.nbytes} bytes, its storage has {storage.nbytes}"
        raise FormatError(f"record {shown(found.name)} {what}")
    return storage


def _counts(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _rebuild(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    dtype: Any,
    *,
    grad: Any = False,
    metadata: Any = None,
    quantizer: tuple[Any, ...] | None = None,
) -> Any:
    if type(storage) is not Storage:
        raise FormatError("a tensor without a storage")
    dtype = dtype if storage.kind.dtype is None else storage.kind.dtype
    if type(dtype) is not DType:
        raise FormatError(f"a tensor of unknown dtype {shown(getattr(dtype, 'name', dtype))}")
    for numbers in (size, stride):
        if type(numbers) is not tuple or len(numbers) > MAX_DIMS or not all(map(_counts, numbers)):
            raise FormatError(f"a tensor with sizes {shown(size)} and strides {shown(stride)}")
    if len(size) != len(stride) or not _counts(offset) or not _counts(prod(size) * dtype.itemsize):
        raise FormatError(
            f"a tensor with sizes {shown(size)}, strides {shown(stride)}, offset {shown(offset)}"
        )
    if 0 not in size:
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if (last + 1) * dtype.itemsize > storage.nbytes:
            raise FormatError(
                f"a tensor of sizes {shown(size)} and strides {shown(stride)} from element "
                f"{offset} on reaches beyond its storage of {storage.nbytes} bytes"
            )
    elif offset * dtype.itemsize > storage.nbytes:
        raise FormatError("an empty tensor that begins beyond its storage")
    flags = metadata if type(metadata) is dict else {}
    stored = StoredTensor(
        dtype=dtype,
        shape=size,
        strides=stride,
        start=storage.record.offset + offset * dtype.itemsize,
        record=storage.record,
        requires_grad=grad is True,
        conj=flags.get("conj") is True,
        neg=flags.get("neg") is True,
        quantizer=quantizer,
    )
    return storage.finish(stored)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> Any:
    return _rebuild(storage, offset, size, stride, None)


def _tensor_v2(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    metadata: Any = None,
) -> Any:
    return _rebuild(storage, offset, size, stride, None, grad=requires_grad, metadata=metadata)


def _tensor_v3(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Any:
    return _rebuild(storage, offset, size, stride, dtype, grad=requires_grad, metadata=metadata)


def _qtensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    quantizer: Any,
    requires_grad: Any,
    hooks: Any,
) -> Any:
    if type(quantizer) is not tuple or not quantizer:
        raise FormatError("a quantized tensor without its scale")
    if type(storage) is Storage and storage.kind.dtype in _PACKED:
        # Several elements share a byte: no numpy array has its shape, so an array of its bytes is
        # used.
        plain = _rebuild(storage, 0, (storage.count,), (1,), None)
        return Opaque("torch._utils", "_rebuild_qtensor", (plain, offset, size, stride, quantizer))
    scheme, *numbers = quantizer
    if not isinstance(scheme, Opaque) or any(type(part) in (tuple, dict) for part in numbers):
        raise FormatError("a quantized tensor of an unknown scheme")
    kept = (scheme.name, *numbers)
    return _rebuild(storage, offset, size, stride, None, grad=requires_grad, quantizer=kept)


def _parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> Any:
    if type(data) is StoredTensor:
        return replace(data, requires_grad=requires_grad is True)
    return data


def _from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """Build a tensor of another class or with attributes, if the class adds nothing."""
    builder = function.builder if type(function) is Reference else None
    make = builder.make if builder else None
    if make not in _TENSORS or type(args) is not tuple or not isinstance(kind, Opaque):
        return NotImplemented
    assert make is not None
    data = make(*args)
    if type(data) is StoredTensor:
        return replace(data, note=f"saved as a {kind.name}")
    return data if kind.name in _SAME else Opaque(kind.module, kind.qualname, (data,), state)


_PACKED = (DType.named("quint4x2"), DType.named("quint2x4"))
_TENSORS = (_tensor, _tensor_v2, _tensor_v3, _qtensor, _parameter)
_SAME = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")

_KINDS = {
    "Bool": "bool",
    "Byte": "uint8",
    "Char": "int8",
    "Short": "int16",
    "Int": "int32",
    "Long": "int64",
    "Half": "float16",
    "Float": "float32",
    "Double": "float64",
    "BFloat16": "bfloat16",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "QInt8": "qint8",
    "QUInt8": "quint8",
    "QInt32": "qint32",
    "QUInt4x2": "quint4x2",
    "QUInt2x4": "quint2x4",
}


def _size(sizes: Any = ()) -> Ints:
    if type(sizes) is not tuple and type(sizes) is not list:
        raise FormatError("a torch.Size that is not made of sizes")
    return tuple(sizes)


REBUILD: dict[str, Builder] = {
    "torch._utils._rebuild_tensor": Builder(_tensor),
    "torch._utils._rebuild_tensor_v2": Builder(_tensor_v2),
    "torch._utils._rebuild_tensor_v3": Builder(_tensor_v3),
    "torch._utils._rebuild_qtensor": Builder(_qtensor),
    "torch._utils._rebuild_parameter": Builder(_parameter),
    "torch._utils._rebuild_parameter_with_state": Builder(_parameter),
    "torch._tensor._rebuild_from_type_v2": Builder(_from_type),
    "torch.Size": Builder(_size),
    **{
        f"torch.{name}Storage": Builder(value=StorageKind(DType.named(dtype)))
        for name, dtype in _KINDS.items()
    },
    "torch.UntypedStorage": Builder(value=StorageKind(None)),
    "torch.storage.UntypedStorage": Builder(value=StorageKind(None)),
    **{f"torch.{dtype.name}": Builder(value=dtype, type=DType, key=True) for dtype in DTYPES},
}
"""The names of torch's tensors that a container's pickle may use."""
