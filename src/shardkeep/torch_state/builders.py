"""Builders for the inert pickle reader that return values of torch: tensors, sizes, dtypes."""

from __future__ import annotations

from typing import Any

import torch

from shardkeep.format.pickle.builders import CORE
from shardkeep.format.pickle.registry import Builder, Reference, Registry
from shardkeep.format.pickle.torch_builders import StoredTensor
from shardkeep.types import DTYPES, DType, Opaque

__all__ = ["TORCH_BUILDERS", "TensorBuilder", "torch_device", "torch_dtype"]


class TensorBuilder:
    """Builds the tensors of one object. Tensors that shared a storage share one again."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}

    def build(self, stored: StoredTensor, record: memoryview) -> torch.Tensor:
        """Return a tensor in new memory.

        Args:
            stored: the tensor's description, whose strides were checked against the record.
            record: the bytes of its storage.

        Raises:
            ValueError: torch cannot build the tensor.
        """
        kind = torch_dtype(stored.dtype.name)
        start = (stored.start - stored.record.offset) // stored.dtype.itemsize
        try:
            made = self._tensor(stored, kind, self._storage(stored, record), start)
            if stored.requires_grad and (kind.is_floating_point or kind.is_complex):
                made.requires_grad_()
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(f"a tensor that torch cannot build: {error}") from error
        return made

    def _storage(self, stored: StoredTensor, record: memoryview) -> torch.UntypedStorage:
        known = self._storages.get(stored.record.offset)
        if known is None or known.nbytes() != len(record):
            copy = torch.frombuffer(bytearray(record), dtype=torch.uint8) if len(record) else None
            known = torch.empty(0).untyped_storage() if copy is None else copy.untyped_storage()
            self._storages[stored.record.offset] = known
        return known

    def _tensor(
        self, stored: StoredTensor, kind: torch.dtype, storage: torch.UntypedStorage, start: int
    ) -> torch.Tensor:
        if stored.quantizer is not None:
            untyped: Any = torch.storage.TypedStorage
            rebuild: Any = torch._utils._rebuild_qtensor
            typed = untyped(wrap_storage=storage, dtype=kind, _internal=True)
            layout = (start, stored.shape, stored.strides)
            quantized: torch.Tensor = rebuild(typed, *layout, _quantizer(stored), False, {})
            return quantized
        made = torch.empty(0, dtype=kind).set_(storage, start, stored.shape, stored.strides)
        made = made.conj() if stored.conj else made
        return torch._neg_view(made) if stored.neg else made


def _quantizer(stored: StoredTensor) -> tuple[Any, ...]:
    """Return the quantizer's parameters as torch takes them, after checking them."""
    scheme, *rest = stored.quantizer or ("",)
    kinds = [type(one) for one in rest]
    if scheme == "torch.per_tensor_affine" and kinds == [float, int]:
        return (torch.per_tensor_affine, *rest)
    if scheme == "torch.per_channel_affine" and kinds == [torch.Tensor, torch.Tensor, int]:
        scales, zeros, axis = rest
        if 0 <= axis < len(stored.shape) and scales.shape == zeros.shape == (stored.shape[axis],):
            return (torch.per_channel_affine, *rest)
    raise ValueError(f"a tensor with an unknown or invalid quantization scheme ({scheme})")


def torch_dtype(name: Any) -> torch.dtype:
    """Return the dtype with this name.

    Raises:
        ValueError: this release of torch has no such dtype.
    """
    found = getattr(torch, name, None) if type(name) is str else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch {torch.__version__} has no dtype {name!r:.40}")
    return found


def torch_device(*name: Any) -> torch.device:
    """Return the device with this name, or with this type and index.

    Raises:
        ValueError: torch has no such device.
    """
    if [type(part) for part in name] not in ([str], [str, int]):
        raise ValueError(f"a device named by {name!r:.60}, not by a text and a number")
    try:
        return torch.device(*name)
    except RuntimeError as error:
        raise ValueError(f"a device that torch does not have: {name!r:.60}") from error


def _size(sizes: Any = ()) -> torch.Size:
    return torch.Size(sizes)


_LAYOUTS = {
    str(layout): layout
    for layout in (getattr(torch, name) for name in dir(torch))
    if isinstance(layout, torch.layout)
}


def _layout(name: Any) -> torch.layout:
    return _LAYOUTS[name]


def _tensor_v3(*args: Any) -> Any:
    """Call the common builder, which takes dtypes of its own type."""
    known = [DType.named(str(arg)) if isinstance(arg, torch.dtype) else arg for arg in args]
    return CORE["torch._utils._rebuild_tensor_v3"].make(*known)  # type: ignore[misc]


def _parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> Any:
    if not isinstance(data, torch.Tensor):
        raise TypeError(f"a parameter made of a {type(data).__name__}, not of a tensor")
    differs = requires_grad is True and (data.is_floating_point() or data.is_complex())
    return torch.nn.Parameter(data.detach(), requires_grad=differs)


def _sparse(layout: Any, data: Any) -> Any:
    """Return a sparse tensor. An index out of range would reach other memory, so torch checks."""
    if not isinstance(layout, torch.layout) or type(data) is not tuple:
        raise TypeError("a sparse tensor without a layout and a tuple of its parts")
    try:
        if layout is torch.sparse_coo:
            indices, values, size, *coalesced = data
            known = bool(coalesced and coalesced[0] is True)
            return torch.sparse_coo_tensor(
                indices, values, size, check_invariants=True, is_coalesced=known or None
            )
        return torch.sparse_compressed_tensor(*data, layout=layout, check_invariants=True)
    except RuntimeError as error:
        raise ValueError(f"a sparse tensor that torch cannot build: {error}") from error


def _from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """Return a tensor without its extra attributes; do not build one of another class."""
    builder = function.builder if type(function) is Reference else None
    known = isinstance(kind, Opaque) and kind.name in _PLAIN_CLASSES and type(args) is tuple
    if not known or builder is None or builder.make is None:
        return NotImplemented
    made = builder.make(*args)
    return made if isinstance(made, torch.Tensor) else NotImplemented


_PLAIN_CLASSES = (
    "torch.Tensor",
    "torch._tensor.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
)

_DTYPES = {
    f"torch.{one.name}": Builder(value=getattr(torch, one.name), type=torch.dtype, key=True)
    for one in DTYPES
    if isinstance(getattr(torch, one.name, None), torch.dtype)
}

TORCH_BUILDERS: Registry = Registry(
    {
        **CORE,
        **_DTYPES,
        "torch.Size": Builder(_size, type=torch.Size, key=True),
        "torch.device": Builder(torch_device, type=torch.device, key=True),
        "torch.serialization._get_layout": Builder(_layout, type=torch.layout, key=True),
        "torch._utils._rebuild_tensor_v3": Builder(_tensor_v3),
        "torch._utils._rebuild_parameter": Builder(_parameter),
        "torch._utils._rebuild_parameter_with_state": Builder(_parameter),
        "torch._utils._rebuild_sparse_tensor": Builder(_sparse),
        "torch._tensor._rebuild_from_type_v2": Builder(_from_type),
    }
)
"""Builders of values that hold only data, including those of torch."""
