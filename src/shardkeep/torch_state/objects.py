"""Conversion of the objects of a state to bytes and back, with torch's own types inside.

They are written as `torch.save` writes them, so that every release of torch can read them. They are
read by the inert pickle reader, which builds an unknown class only if the caller trusts its name.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from shardkeep.errors import Conflict, FormatError, Untrusted
from shardkeep.format.pickle.registry import Limits, Registry, check_nesting, opaque_classes
from shardkeep.format.torch_zip import container
from shardkeep.state.markers import PerRank, Replicated
from shardkeep.torch_state.builders import TORCH_BUILDERS, TensorBuilder, torch_device, torch_dtype
from shardkeep.torch_state.pieces import is_sharded
from shardkeep.torch_state.trusted import TrustedClasses

__all__ = ["TORCH_MAKERS", "from_bytes", "to_bytes"]

TORCH_MAKERS: Mapping[str, Callable[[Any], Any]] = {
    "torch.Size": torch.Size,
    "torch.dtype": torch_dtype,
    "torch.device": torch_device,
}
"""Builders of torch's values, for `format.values.decode`."""


def to_bytes(value: Any, *, name: str) -> bytes:
    """Return the `torch.save` container of an object. Tensors inside it are stored as on the CPU.

    Args:
        value: the object.
        name: its name, for errors.

    Raises:
        Conflict: the object cannot be pickled, nests too deeply, or contains a sharded tensor.
    """
    out = io.BytesIO()
    try:
        check_nesting(value, Limits().depth, sys.maxsize)
        torch.save(value, out, pickle_module=_PickleModule)
    except _ShardedInside as error:
        raise Conflict(
            f"object {name!r} holds a {error}, of which each rank has only a part. Such tensors "
            "can be saved only in dicts and lists: use a list in place of a tuple, set or class"
        ) from None
    except _MarkerInside as error:
        raise Conflict(
            f"object {name!r} holds a {error} inside, which has no effect there. Markers work only "
            "in the dicts and lists of a state: use a list in place of a tuple, set or class"
        ) from None
    except FormatError as error:
        raise Conflict(f"object {name!r} cannot be saved: {error.what}") from None
    except (
        Exception
    ) as error:  # Classes have their own code for pickling, which may raise anything.
        kind = type(error).__name__
        raise Conflict(f"object {name!r} cannot be pickled: {kind}: {error}") from error
    return out.getvalue()


def from_bytes(data: bytes, *, name: str, trust: Sequence[str] = ()) -> Any:
    """Return the object that a container holds, with tensors, sizes, dtypes and devices of torch.

    Args:
        data: the container.
        name: the object's name, for errors.
        trust: classes that may be imported and built, as "module.Class" or "module.*".

    Raises:
        Untrusted: the object needs other classes, which were neither imported nor built.
        FormatError: the container is damaged or hostile.
        Mismatch: a trusted class cannot be imported, or does not accept what is stored.
    """
    value = _read(data, name, TORCH_BUILDERS)
    needed = opaque_classes(value)
    trusted = TrustedClasses(name, trust)
    left = tuple(one for one in needed if not trusted.covers(one))
    if left:
        raise Untrusted(name, left)
    return trusted.resolve(_read(data, name, trusted.builders(needed))) if needed else value


def _read(data: bytes, name: str, builders: Registry) -> Any:
    return container.value(
        data, builders, file="", place=f"object {name!r}", make_tensor=TensorBuilder().build
    )


class _ShardedInside(Exception):
    """The object contains a tensor of which each rank has only a part."""


class _MarkerInside(Exception):
    """The object contains a marker such as `PerRank`, where it has no effect."""


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """Pickle tensors as plain ones on the CPU, without the rest of a larger storage."""
        if is_sharded(value):
            raise _ShardedInside(type(value).__name__)
        if isinstance(value, PerRank | Replicated):
            raise _MarkerInside(type(value).__name__)
        if type(value) is not torch.Tensor:
            return NotImplemented
        if value.is_meta:
            raise ValueError("a tensor on the meta device has no data")
        plain: Any = value.detach().cpu()
        strided = plain.layout is torch.strided and not plain.is_quantized
        if strided and plain.untyped_storage().nbytes() > plain.numel() * plain.element_size():
            plain = plain.clone(memory_format=torch.contiguous_format)
        return plain.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


class _PickleModule:
    """A stand-in for the pickle module, for `torch.save`."""

    Pickler = _Pickler
