"""Description of tensors: the pieces of each tensor that this rank holds. No data moves."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy

from shardkeep.errors import Conflict, FormatError
from shardkeep.torch_state import placements
from shardkeep.torch_state.checkpointable import is_checkpointable, shard_boxes
from shardkeep.torch_state.placements import PlacedBox, Placement
from shardkeep.torch_state.shards import Shards
from shardkeep.types import DTYPES, Box, DType

__all__ = [
    "DTYPE_CODES",
    "PLAIN_CLASSES",
    "TensorDescription",
    "TensorPiece",
    "check_unique_names",
    "describe_tensor",
    "is_any_tensor",
    "is_fake",
    "is_sharded",
    "is_tensor",
    "is_whole_plain_tensor",
]

_DTENSOR = (
    ("torch.distributed.tensor", "DTensor"),  # 2.5 and later
    ("torch.distributed._tensor", "DTensor"),  # 2.4
)
_SHARDED = (("torch.distributed._shard.sharded_tensor", "ShardedTensor"),)
_FAKE = (("torch._subclasses.fake_tensor", "FakeTensor"),)
_ASYNC = (("torch.distributed._functional_collectives", "AsyncCollectiveTensor"),)
_STRIDED_SHARD = (  # 2.5 and later
    ("torch.distributed.tensor.placement_types", "_StridedShard"),
)
DTYPE_CODES: dict[torch.dtype, int] = {
    getattr(torch, dtype.name): dtype.code
    for dtype in DTYPES
    if hasattr(torch, dtype.name) and not dtype.name.startswith("q")
}
"""torch dtype -> its code, for all dtypes that are not quantized."""

PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter)
"""The classes of nearly all tensors. Other subclasses may behave in any way."""


class TensorPiece(NamedTuple):
    """A piece of a tensor that this rank holds.

    Attributes:
        box: the piece's box of the global tensor. It is empty only if the whole tensor is.
        local: the piece in memory. Its shape is `box.sizes`; it may have any strides and device.
    """

    box: Box
    local: torch.Tensor


class TensorDescription(NamedTuple):
    """A tensor of a state, and its pieces on this rank.

    Attributes:
        name: its flat name.
        dtype: its element type.
        shape: its global shape.
        pieces: what this rank holds of it; empty if other ranks hold all of it.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[TensorPiece, ...]


def is_whole_plain_tensor(value: Any) -> bool:
    """Return whether a leaf is like nearly all leaves: a whole tensor in memory of its own.

    False for a tensor without memory: it is empty or cannot be saved, see `describe_tensor`.
    """
    return (
        type(value) in PLAIN_CLASSES
        and value.dtype in DTYPE_CODES
        and value.layout is torch.strided
        and not value.is_nested
        and not hasattr(value, "global_shape")
        and value.data_ptr() != 0
    )


def is_any_tensor(value: Any) -> bool:
    """Return whether a value is a tensor for `flatten`, which splits lists that hold one."""
    return isinstance(value, torch.Tensor | Shards)


def is_tensor(value: Any) -> bool:
    """Return whether a value is stored as a tensor, rather than as an object.

    Sparse, MKL-DNN and quantized tensors are objects, because they have more than one block of
    elements. So is a tuple or any other value that contains tensors.
    """
    if type(value) in PLAIN_CLASSES:
        return value.layout is torch.strided and not value.is_quantized
    if isinstance(value, Shards):
        return True
    if not isinstance(value, torch.Tensor):
        return False
    if _flattens(value) or _is(value, _DTENSOR + _SHARDED) or is_lazy(value) or value.is_nested:
        return True
    return value.layout is torch.strided and not value.is_quantized


def is_sharded(value: Any) -> bool:
    """Return whether several ranks hold parts of a tensor. No object may contain such a tensor."""
    return isinstance(value, Shards) or _is(value, _DTENSOR + _SHARDED) or is_checkpointable(value)


def is_fake(value: Any) -> bool:
    """Return whether a value is one of torch's fake tensors, which have no data."""
    return _is(value, _FAKE)


def describe_tensor(name: str, value: Any) -> tuple[TensorDescription, ...]:
    """Return what this rank holds of a tensor.

    A tensor subclass with `__tensor_flatten__` gives one result for each of its inner tensors,
    named `{name}.{attribute}`. Its other attributes are not stored: a load takes them from the
    template. Other tensors give one result.

    Raises:
        Conflict: the tensor has no memory of its own (meta, fake, lazy), is nested or `Partial`, or
            its local tensor does not have the shape that its placements imply.
    """
    if is_checkpointable(value):
        parts = shard_boxes(name, value)
        return (_assembled(name, value.dtype, value.global_shape, parts),)
    found = None if type(value) in PLAIN_CLASSES else _special(name, value)
    return (_plain(name, value),) if found is None else found


def _special(name: str, value: Any) -> tuple[TensorDescription, ...] | None:
    if isinstance(value, Shards):
        return (_assembled(name, value.dtype, value.shape, value.parts),)
    if _is(value, _DTENSOR):
        return (_dtensor(name, value),)
    if _is(value, _SHARDED):
        return (_sharded(name, value),)
    if _is(value, _ASYNC):
        return describe_tensor(name, _waited(value))
    if _flattens(value):
        attributes, _ = value.__tensor_flatten__()
        inner = [(f"{name}.{attr}", getattr(value, attr)) for attr in attributes]
        return tuple(each for attr, one in inner for each in describe_tensor(attr, one))
    return None


def check_unique_names(names: Sequence[str]) -> None:
    """Raise `Conflict` for a duplicate name. Only names of inner tensors can be duplicates."""
    if len(set(names)) == len(names):
        return
    name = next(name for name, count in Counter(names).items() if count > 1)
    raise Conflict(
        f"two values would be saved under the name {name!r}; one of them is an inner tensor of a "
        "tensor subclass: rename the other"
    )


def _is(value: Any, classes: tuple[tuple[str, str], ...]) -> bool:
    """Return whether a value is of one of these classes, without importing their modules."""
    return _derives(value.__class__, classes)


@lru_cache(maxsize=1024)
def _derives(kind: type, classes: tuple[tuple[str, str], ...]) -> bool:
    """Return whether a class derives from one of these. Cached: its bases were imported before."""
    return any(issubclass(kind, base) for base in _imported(classes))


def _imported(classes: Sequence[tuple[str, str]]) -> list[Any]:
    found = [getattr(sys.modules.get(module), name, None) for module, name in classes]
    return [kind for kind in found if kind is not None]


def _flattens(value: Any) -> bool:
    return hasattr(type(value), "__tensor_flatten__") and not value.is_nested


def _dtype(name: str, dtype: torch.dtype) -> DType:
    try:
        return _named(dtype)
    except FormatError as error:
        raise Conflict(f"tensor {name!r}: {error}") from None


@cache
def _named(dtype: torch.dtype) -> DType:
    return DType.named(str(dtype))


def _memory_of(name: str, value: torch.Tensor) -> torch.Tensor:
    """Return a plain, detached tensor on the same memory; `Conflict` if there is none."""
    kind = type(value)
    plain = kind in PLAIN_CLASSES
    if not plain and is_lazy(value):
        raise Conflict(f"tensor {name!r} is not initialized yet: run the lazy module once")
    if value.is_nested:
        raise Conflict(f"tensor {name!r} is nested: save its values and offsets instead")
    if value.is_meta or (not plain and is_fake(value)):
        raise Conflict(f"tensor {name!r} is on the meta device or fake, so it has no data")
    if value.layout is not torch.strided or value.is_quantized:
        raise Conflict(f"tensor {name!r} is {value.layout} {value.dtype}: it is saved as an object")
    if plain:
        return value.detach()
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        # Wrapper subclasses have no storage, or one that differs from the tensor's values.
        raise Conflict(
            f"tensor {name!r} is a {kind.__module__}.{kind.__qualname__}, whose memory cannot be "
            "accessed: the class needs __tensor_flatten__ and __tensor_unflatten__"
        )
    return value.detach().as_subclass(torch.Tensor)


def _plain(name: str, value: torch.Tensor) -> TensorDescription:
    local = _memory_of(name, value)
    dtype, shape = _dtype(name, local.dtype), tuple(local.shape)
    return TensorDescription(name, dtype, shape, (TensorPiece(Box.whole(shape), local),))


def _assembled(
    name: str, dtype: torch.dtype, shape: Sequence[int], held: Iterable[tuple[Box, torch.Tensor]]
) -> TensorDescription:
    kind, sizes = _dtype(name, dtype), tuple(int(size) for size in shape)
    pieces = [TensorPiece(box, _memory_of(name, local)) for box, local in held if box.numel]
    return TensorDescription(name, kind, sizes, tuple(pieces))


def _sharded(name: str, value: Any) -> TensorDescription:
    held = []
    for shard in value.local_shards():
        box = Box(tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes))
        if tuple(shard.tensor.shape) != box.sizes:
            raise Conflict(
                f"tensor {name!r}: a shard of shape {tuple(shard.tensor.shape)} has metadata for "
                f"the box {box}"
            )
        held.append((box, shard.tensor))
    meta = value.metadata()
    return _assembled(name, meta.tensor_properties.dtype, meta.size, held)


def _dtensor(name: str, value: Any) -> TensorDescription:
    shape = tuple(map(int, value.shape))
    mesh = value.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        _converted(name, value.placements, len(shape))
        return _assembled(name, value.dtype, shape, ())
    local = value._local_tensor
    if _is(local, _ASYNC):
        local = _waited(local)
    if type(local) not in PLAIN_CLASSES:
        raise Conflict(
            f"tensor {name!r} is a DTensor of {type(local).__module__}.{type(local).__qualname__}; "
            "only DTensors of plain tensors can be saved"
        )
    if local.dtype != value.dtype:
        raise Conflict(f"tensor {name!r} is {value.dtype}, but its local tensor is {local.dtype}")
    layout = _DTensorLayout(
        shape,
        tuple(mesh.shape),
        tuple(coordinate),
        value.placements,
        tuple(map(type, value.placements)),
        getattr(value._spec, "shard_order", None),
        tuple(local.shape),
    )
    parts = _cached_boxes.get(layout)
    if parts is None:
        if len(_cached_boxes) >= _MAX_CACHED_LAYOUTS:
            _cached_boxes.clear()
        parts = _cached_boxes[layout] = _boxes_of(name, layout)
    local = _memory_of(name, local)
    held = [part for part in parts if part.box.numel]
    kind = _dtype(name, value.dtype)
    if len(held) == 1 and held[0].box.numel == local.numel():
        return TensorDescription(name, kind, shape, (TensorPiece(held[0].box, local),))
    pieces = [TensorPiece(part.box, local[part.local]) for part in held]
    return TensorDescription(name, kind, shape, tuple(pieces))


class _DTensorLayout(NamedTuple):
    """How a DTensor is distributed over its mesh, from this rank's point of view.

    Attributes:
        shape: the global shape.
        mesh: the shape of the mesh.
        coordinate: this rank's position in the mesh.
        placements: torch's placements, one for each dimension of the mesh.
        kinds: the classes of the placements, as a strided shard may be equal to a plain one.
        order: torch's `shard_order`; None before 2.10.
        local: the shape of the local tensor.
    """

    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    coordinate: tuple[int, ...]
    placements: tuple[Any, ...]
    kinds: tuple[type, ...]
    order: Any
    local: tuple[int, ...]


_MAX_CACHED_LAYOUTS = 4096
_cached_boxes: dict[_DTensorLayout, tuple[PlacedBox, ...]] = {}
"""Cached, as most tensors of a state have the same layout as others."""


def _boxes_of(name: str, layout: _DTensorLayout) -> tuple[PlacedBox, ...]:
    """Return the boxes that the local tensor consists of; check its shape against them."""
    given = _converted(name, layout.placements, len(layout.shape))
    for sequence in _sequences(name, given, layout):
        parts = placements.placed_boxes(
            layout.shape, layout.mesh, layout.coordinate, given, sequence
        )
        if _fits(parts, layout.local):
            break
    else:
        where = f"the rank at {list(layout.coordinate)} of a mesh of {list(layout.mesh)}"
        raise Conflict(
            f"tensor {name!r}: the local tensor of {where} has the shape {list(layout.local)}, but "
            f"placements {list(layout.placements)} of a tensor of {list(layout.shape)} give another"
        )
    return parts


def _sequences(
    name: str, given: Sequence[Placement], layout: _DTensorLayout
) -> list[Sequence[int] | None]:
    """Return the sequences in which the placements may cut, the most likely first."""
    if not _imported(_STRIDED_SHARD):
        _refuse_two_cuts(name, given, layout)
    if layout.order is None or any(isinstance(one, placements.StridedShard) for one in given):
        return [None, range(len(given))]
    cuts = tuple(axis for entry in layout.order for axis in entry.mesh_dims)
    wanted = [axis for axis, one in enumerate(given) if not isinstance(one, placements.Replicate)]
    if sorted(cuts) != wanted:
        raise Conflict(f"tensor {name!r} has an unknown shard order: {layout.order}")
    return [cuts]


def _refuse_two_cuts(name: str, given: Sequence[Placement], layout: _DTensorLayout) -> None:
    """Refuse tensors of FSDP2 over tensor parallelism in torch 2.4.

    Their placements look as if the first one cut first, but the last one does. Nothing tells them
    from other tensors. If they were saved as their placements say, rows would change places.
    """
    dims = [one.dim for one in given if isinstance(one, placements.Shard)]
    if len(dims) > len(set(dims)):
        raise Conflict(
            f"tensor {name!r}: placements {list(layout.placements)} cut a dimension twice, but "
            "this release of torch does not say which cut comes first; use torch 2.5 or later"
        )


def _fits(parts: Sequence[PlacedBox], local: tuple[int, ...]) -> bool:
    if not parts:
        return 0 in local
    return len(local) == len(parts[-1].local) and all(
        size == place.stop for size, place in zip(local, parts[-1].local, strict=True)
    )


def _converted(name: str, torchs: Sequence[Any], ndim: int) -> tuple[Placement, ...]:
    """Convert torch's placements; raise `Conflict` for an unknown one."""
    return tuple(_placement(name, placement, ndim) for placement in torchs)


def _placement(name: str, placement: Any, ndim: int) -> Placement:
    if placement.is_partial():
        raise Conflict(
            f"tensor {name!r} is {placement!r}: its values are not summed up over the ranks yet"
        )
    if placement.is_replicate():
        return placements.Replicate()
    dim = getattr(placement, "dim", None)
    if isinstance(dim, int) and -ndim <= dim < ndim:
        if _is(placement, _STRIDED_SHARD):
            return placements.StridedShard(dim % ndim, int(placement.split_factor))
        if type(placement).__name__ == "Shard":
            return placements.Shard(dim % ndim)
    raise Conflict(f"tensor {name!r} has an unknown placement: {placement!r}")


def _waited(value: Any) -> torch.Tensor:
    """Return the tensor of a collective, which may still be running."""
    done: torch.Tensor = value.trigger_wait()
    return done
