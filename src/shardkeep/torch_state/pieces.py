"""What this rank holds of each tensor: boxes of it, in its memory. No data moves."""

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
"""The code of each dtype that plain memory can have (so not of quantized ones)."""

PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter)
"""Classes of nearly all tensors; exactly these, as a subclass may be anything."""


class TensorPiece(NamedTuple):
    """A box of a tensor that this rank holds.

    Attributes:
        box: which part of it this is; never empty, unless the whole tensor is.
        local: its memory; the shape is `box.sizes`, strides and device are any.
    """

    box: Box
    local: torch.Tensor


class TensorDescription(NamedTuple):
    """A tensor of the state, and its pieces on this rank: none, where others have them all.

    Attributes:
        name: its flat name.
        dtype: element type.
        shape: global shape, in elements.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[TensorPiece, ...]


def is_whole_plain_tensor(value: Any) -> bool:
    """Whether a leaf is what nearly every one is: a whole tensor in memory of its own.

    Without memory a tensor is empty, or can't be saved: `describe_tensor` knows.
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
    """Whether `tree.flatten` sees a tensor: DCP walks the lists that hold one."""
    return isinstance(value, torch.Tensor | Shards)


def is_tensor(value: Any) -> bool:
    """Whether a value is stored as a tensor, by `describe_tensor`.

    Sparse, MKL-DNN and quantized tensors are objects: their content is more than one block of
    elements. So is a tuple or any other value that has tensors inside.
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
    """Whether a value belongs to several ranks: no object may hold such a one inside."""
    return isinstance(value, Shards) or _is(value, _DTENSOR + _SHARDED) or is_checkpointable(value)


def is_fake(value: Any) -> bool:
    """Whether a value is one of torch's fake tensors, which have no data."""
    return _is(value, _FAKE)


def describe_tensor(name: str, value: Any) -> tuple[TensorDescription, ...]:
    """What this rank holds of the tensor `value`.

    One result, or, for a tensor subclass that has `__tensor_flatten__`, one for each of its inner
    tensors, named `{name}.{attribute}`. What else it is made of is not stored: a load takes it from
    the template.

    Raises:
        Conflict: the tensor has no memory of its own (meta, fake, lazy), is nested or `Partial`, or
            its memory does not have the shape that its placements say.
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
    """Raise Conflict if a name is there twice: those of leaves alone never are."""
    if len(set(names)) == len(names):
        return
    name = next(name for name, count in Counter(names).items() if count > 1)
    raise Conflict(
        f"two things would be saved under the name {name!r}: one of them is an inner tensor of a "
        "tensor subclass; rename the other"
    )


def _is(value: Any, places: tuple[tuple[str, str], ...]) -> bool:
    """Whether the value is of one of these classes, without importing a module for the question."""
    return _derives(value.__class__, places)


@lru_cache(maxsize=1024)
def _derives(kind: type, places: tuple[tuple[str, str], ...]) -> bool:
    """Cached: what a class derives from was imported before it was made."""
    return any(issubclass(kind, base) for base in _known(places))


def _known(places: Sequence[tuple[str, str]]) -> list[Any]:
    found = [getattr(sys.modules.get(module), name, None) for module, name in places]
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
    """The tensor as a plain one, detached, on its memory; Conflict if it has none."""
    kind = type(value)
    plain = kind in PLAIN_CLASSES
    if not plain and is_lazy(value):
        raise Conflict(f"tensor {name!r} is not initialised yet: run the lazy module once")
    if value.is_nested:
        raise Conflict(f"tensor {name!r} is nested: save its values and offsets instead")
    if value.is_meta or (not plain and is_fake(value)):
        raise Conflict(f"tensor {name!r} is on the meta device, or fake: it has no data")
    if value.layout is not torch.strided or value.is_quantized:
        raise Conflict(f"tensor {name!r} is {value.layout} {value.dtype}: an object, not a tensor")
    if plain:
        return value.detach()
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        # Wrappers have no storage, or one that is not what the tensor shows.
        raise Conflict(
            f"tensor {name!r} is a {kind.__module__}.{kind.__qualname__}, whose memory can't be "
            "seen: it needs __tensor_flatten__"
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
                f"tensor {name!r}: a shard of shape {tuple(shard.tensor.shape)} says it is {box}"
            )
        held.append((box, shard.tensor))
    meta = value.metadata()
    return _assembled(name, meta.tensor_properties.dtype, meta.size, held)


def _dtensor(name: str, value: Any) -> TensorDescription:
    shape = tuple(map(int, value.shape))
    mesh = value.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        _given(name, value.placements, len(shape))
        return _assembled(name, value.dtype, shape, ())
    local = value._local_tensor
    if _is(local, _ASYNC):
        local = _waited(local)
    if type(local) not in PLAIN_CLASSES:
        raise Conflict(
            f"tensor {name!r} is a DTensor of {type(local).__module__}.{type(local).__qualname__}: "
            "only DTensors of plain tensors can be saved"
        )
    if local.dtype != value.dtype:
        raise Conflict(f"tensor {name!r} is {value.dtype}, but its local tensor is {local.dtype}")
    lies = _Lies(
        shape,
        tuple(mesh.shape),
        tuple(coordinate),
        value.placements,
        tuple(map(type, value.placements)),
        getattr(value._spec, "shard_order", None),
        tuple(local.shape),
    )
    parts = _known_parts.get(lies)
    if parts is None:
        if len(_known_parts) >= _MANY:
            _known_parts.clear()
        parts = _known_parts[lies] = _parts(name, lies)
    local = _memory_of(name, local)
    held = [part for part in parts if part.box.numel]
    kind = _dtype(name, value.dtype)
    if len(held) == 1 and held[0].box.numel == local.numel():
        return TensorDescription(name, kind, shape, (TensorPiece(held[0].box, local),))
    pieces = [TensorPiece(part.box, local[part.local]) for part in held]
    return TensorDescription(name, kind, shape, tuple(pieces))


class _Lies(NamedTuple):
    """How a DTensor lies over its mesh, and what this rank has of it.

    Attributes:
        shape: of the whole tensor.
        mesh, coordinate: the mesh's shape, and this rank's place in it.
        placements, kinds: torch's own, one for each dimension of the mesh, and their classes: a
            strided shard may be equal to a plain one.
        order: torch's `shard_order`; None before 2.10.
        local: the local tensor's shape.
    """

    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    coordinate: tuple[int, ...]
    placements: tuple[Any, ...]
    kinds: tuple[type, ...]
    order: Any
    local: tuple[int, ...]


_MANY = 4096
_known_parts: dict[_Lies, tuple[PlacedBox, ...]] = {}
"""Most tensors of a state have the shape of others, and lie like them. At most `_MANY`."""


def _parts(name: str, lies: _Lies) -> tuple[PlacedBox, ...]:
    """The parts that the local tensor consists of; its shape is held against them."""
    given = _given(name, lies.placements, len(lies.shape))
    for sequence in _sequences(name, given, lies):
        parts = placements.placed_boxes(lies.shape, lies.mesh, lies.coordinate, given, sequence)
        if _fits(parts, lies.local):
            break
    else:
        where = f"the rank at {list(lies.coordinate)} of a mesh of {list(lies.mesh)}"
        raise Conflict(
            f"tensor {name!r}: the local tensor of {where} has the shape {list(lies.local)}, which "
            f"placements {list(lies.placements)} of a tensor of {list(lies.shape)} do not give"
        )
    return parts


def _sequences(name: str, given: Sequence[Placement], lies: _Lies) -> list[Sequence[int] | None]:
    """In which sequences the placements may cut, the likeliest first."""
    if not _known(_STRIDED_SHARD):
        _refuse_two_cuts(name, given, lies)
    if lies.order is None or any(isinstance(one, placements.StridedShard) for one in given):
        return [None, range(len(given))]
    cuts = tuple(axis for entry in lies.order for axis in entry.mesh_dims)
    wanted = [axis for axis, one in enumerate(given) if not isinstance(one, placements.Replicate)]
    if sorted(cuts) != wanted:
        raise Conflict(f"tensor {name!r} has a shard order that is not understood: {lies.order}")
    return [cuts]


def _refuse_two_cuts(name: str, given: Sequence[Placement], lies: _Lies) -> None:
    """Torch 2.4 gives tensors of FSDP2 over tensor parallelism as if the first placement cut first.

    In truth the last one does. Nothing tells these tensors from others: saved as they say they are,
    their rows would be mixed up.
    """
    dims = [one.dim for one in given if isinstance(one, placements.Shard)]
    if len(dims) > len(set(dims)):
        raise Conflict(
            f"tensor {name!r}: placements {list(lies.placements)} cut a dimension twice, and this "
            "torch does not say which cut comes first; use torch 2.5 or later"
        )


def _fits(parts: Sequence[PlacedBox], local: tuple[int, ...]) -> bool:
    if not parts:
        return 0 in local
    return len(local) == len(parts[-1].local) and all(
        size == place.stop for size, place in zip(local, parts[-1].local, strict=True)
    )


def _given(name: str, torchs: Sequence[Any], ndim: int) -> tuple[Placement, ...]:
    """Torch's placements as ours, one for each dimension of the mesh; Conflict for any other."""
    return tuple(_placement(name, placement, ndim) for placement in torchs)


def _placement(name: str, placement: Any, ndim: int) -> Placement:
    if placement.is_partial():
        raise Conflict(
            f"tensor {name!r} is {placement!r}: its values are not summed up over ranks yet"
        )
    if placement.is_replicate():
        return placements.Replicate()
    dim = getattr(placement, "dim", None)
    if isinstance(dim, int) and -ndim <= dim < ndim:
        if _is(placement, _STRIDED_SHARD):
            return placements.StridedShard(dim % ndim, int(placement.split_factor))
        if type(placement).__name__ == "Shard":
            return placements.Shard(dim % ndim)
    raise Conflict(f"tensor {name!r} is placed by {placement!r}, which is not understood")


def _waited(value: Any) -> torch.Tensor:
    """The tensor of a collective that may still be under way."""
    done: torch.Tensor = value.trigger_wait()
    return done
