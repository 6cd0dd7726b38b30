"""Objects of a state, as bytes and back, with torch's own types inside.

They are written as `torch.save` writes them, so that every release can read them. They are read
by the inert reader: what it does not know stays unbuilt until its class is trusted by name.
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
"""What `format.values.decode` makes of the values of torch."""


def to_bytes(value: Any, *, name: str) -> bytes:
    """The `torch.save` container of an object. Tensors inside it are stored as on the CPU.

    Raises:
        Conflict: it can't be pickled, nests too deeply, or holds a tensor that is spread over
            ranks; it names the object.
    """
    out = io.BytesIO()
    try:
        check_nesting(value, Limits().depth, sys.maxsize)
        torch.save(value, out, pickle_module=_Pickling)
    except _Spread as error:
        raise Conflict(
            f"object {name!r} holds a {error}, which each rank has only a part of; tensors are "
            "found in dicts and lists: use a list in place of a tuple, set or class"
        ) from None
    except _Marked as error:
        raise Conflict(
            f"object {name!r} holds a {error} inside, which would be saved as it is: marks are "
            "found in dicts and lists of a state that is flattened"
        ) from None
    except FormatError as error:
        raise Conflict(f"object {name!r} can't be saved: {error.what}") from None
    except Exception as error:  # anything, as classes have their own code for this
        kind = type(error).__name__
        raise Conflict(f"object {name!r} can't be pickled: {kind}: {error}") from error
    return out.getvalue()


def from_bytes(data: bytes, *, name: str, trust: Sequence[str] = ()) -> Any:
    """The object of a container, with real tensors, sizes, dtypes and devices of torch.

    Args:
        data: the container.
        name: the object's name, for errors.
        trust: classes that may be imported and built, as "module.Class" or "module.*".

    Raises:
        Untrusted: it needs other classes; they were neither imported nor built.
        FormatError: it is broken or hostile.
        Mismatch: a trusted class can't be imported or does not take what is stored.
    """
    value = _read(data, name, TORCH_BUILDERS)
    needed = opaque_classes(value)
    trusted = TrustedClasses(name, trust)
    left = tuple(one for one in needed if not trusted.covers(one))
    if left:
        raise Untrusted(name, left)
    return trusted.resolve(_read(data, name, trusted.builders(needed))) if needed else value


def _read(data: bytes, name: str, builders: Registry) -> Any:
    maker = TensorBuilder()
    return container.value(
        data, builders, file="", place=f"object {name!r}", make_tensor=maker.tensor
    )


class _Spread(Exception):
    """A tensor inside the object belongs to several ranks."""


class _Marked(Exception):
    """What marks a value stands where nobody looks for it."""


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """Tensors go as plain ones, on the CPU, without the rest of a larger storage."""
        if is_sharded(value):
            raise _Spread(type(value).__name__)
        if isinstance(value, PerRank | Replicated):
            raise _Marked(type(value).__name__)
        if type(value) is not torch.Tensor:
            return NotImplemented
        if value.is_meta:
            raise ValueError("a tensor on the meta device has no data")
        plain: Any = value.detach().cpu()
        strided = plain.layout is torch.strided and not plain.is_quantized
        if strided and plain.untyped_storage().nbytes() > plain.numel() * plain.element_size():
            plain = plain.clone(memory_format=torch.contiguous_format)
        return plain.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


class _Pickling:
    """What `torch.save` takes as a pickle module."""

    Pickler = _Pickler
