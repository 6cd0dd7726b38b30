"""Staging: copies of a state on the CPU, which later changes of the state do not affect.

Torch's own stagers drop some values (tensors without dimensions in a DTensor, the attributes of a
`CheckpointableTensor`), refuse others (subclasses), and differ between releases.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from shardkeep.torch_state.checkpointable import CheckpointableTensor, is_checkpointable
from shardkeep.torch_state.memory import integer_view
from shardkeep.torch_state.pieces import is_fake
from shardkeep.torch_state.shards import Shards

__all__ = ["Allocate", "copy_state", "is_plain"]

Allocate = Callable[[int], torch.Tensor]
"""Returns memory of a number of bytes: a uint8 tensor on the CPU, aligned for every dtype."""

_IMMUTABLE_TYPES = frozenset(
    [type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size]
)
_OUT_OF_MEMORY_ERRORS = (MemoryError, torch.cuda.OutOfMemoryError)
_CHECKPOINTABLE_ATTRIBUTES = tuple(CheckpointableTensor.__annotations__)


def copy_state(state: Any, *, allocate: Allocate | None = None, keep_tensors: bool = False) -> Any:
    """Return a copy of a state: its containers, objects and tensors.

    A value that is in the state several times is copied once. Tensors become plain ones on the CPU,
    with their strides if these are dense. DTensors, ShardedTensors, `Shards` and subclasses with
    `__tensor_flatten__` keep their class, around copies. Objects are copied as by pickling, with
    the tensors in them. An object that cannot be copied stays as it is, so that saving it raises
    the error. So do tensors without data, and tensors of classes that have no copies.

    Args:
        state: what to copy.
        allocate: returns the memory for a plain tensor; by default, each has its own.
        keep_tensors: whether the copy holds the state's own tensors, except for those that are
            conjugated or negated lazily. Everything else is copied.

    Raises:
        MemoryError: there is no memory for the copies.
        RuntimeError: a device failed, or has no memory.
    """
    with torch.no_grad():
        return _Copier(allocate or _own_memory, keep_tensors)(state)


def _own_memory(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


class _Copier:
    """One copy of one state.

    Everything that was copied stays alive, because the id of a dead object is used again.
    """

    def __init__(self, allocate: Allocate, keep_tensors: bool) -> None:
        self._allocate, self._keep_tensors = allocate, keep_tensors
        self._done: dict[int, tuple[Any, Any]] = {}
        self._memory: dict[Any, tuple[Any, torch.Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if type(value) in _IMMUTABLE_TYPES:
            return value
        if (known := self._done.get(id(value))) is None:
            known = self._done[id(value)] = (value, self._copy(value))
        return known[1]

    def _copy(self, value: Any) -> Any:
        kind = type(value)
        if kind in (dict, OrderedDict):
            made: dict[Any, Any] = kind()
            self._done[id(value)] = (value, made)  # Before its content, as it may contain itself.
            made.update((key, self(inner)) for key, inner in value.items())
            return made
        if kind is list:
            listed: list[Any] = []
            self._done[id(value)] = (value, listed)
            listed.extend(map(self, value))
            return listed
        if kind is tuple:
            return tuple(map(self, value))
        if isinstance(value, torch.Tensor):
            return _resolved(value) if self._keep_tensors else self._tensor(value)
        if kind is Shards:
            parts = [(box, self(tensor)) for box, tensor in value.parts]
            return Shards(value.shape, parts, value.dtype)
        return self._object(value)

    def _object(self, value: Any) -> Any:
        tensors: list[torch.Tensor] = []
        stream = io.BytesIO()
        try:
            _Pickler(stream, tensors).dump(value)
        except Exception as error:
            return _deep_copy(value, error)
        copies = [self(tensor) for tensor in tensors]  # Not in a try: an error here is raised.
        stream.seek(0)
        try:
            return _Unpickler(stream, copies).load()
        except Exception as error:
            return _deep_copy(value, error)

    def _tensor(self, value: Any) -> Any:
        if is_plain(value):
            return self._plain(value)
        if hasattr(value, "trigger_wait"):  # The result of a collective that may still run.
            return self(value.trigger_wait())
        if hasattr(value, "local_shards"):
            on_cpu = value.cpu()
            return copy.deepcopy(on_cpu) if on_cpu is value else on_cpu
        if hasattr(value, "__tensor_flatten__") and not value.is_nested:
            attributes, context = value.__tensor_flatten__()
            inner = {name: self(getattr(value, name)) for name in attributes}
            kind: Any = type(value)
            return kind.__tensor_unflatten__(inner, context, value.size(), value.stride())
        return value if _has_no_data(value) else _as_its_kind_copies(value)

    def _plain(self, value: torch.Tensor) -> torch.Tensor:
        source = integer_view(value.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg())
        memory_key = (source.device, source.data_ptr(), value.dtype, source.shape, source.stride())
        tied = source.numel() and not is_checkpointable(value)
        if tied and memory_key in self._memory:
            return self._memory[memory_key][1]
        nbytes = source.numel() * source.element_size()
        strides = torch.empty_like(source, device="meta").stride()
        memory = self._allocate(nbytes).view(source.dtype)
        target = memory.as_strided(source.shape, strides)
        target.copy_(source)
        made = target.view(value.dtype)
        if tied:
            self._memory[memory_key] = (source, made)
        elif is_checkpointable(value):
            vars(made).update({name: getattr(value, name) for name in _CHECKPOINTABLE_ATTRIBUTES})
        return made


def _resolved(value: torch.Tensor) -> torch.Tensor:
    """Return the tensor without lazy conjugation or negation, which torch's stagers would lose."""
    return value.resolve_conj().resolve_neg() if is_plain(value) else value


def _as_its_kind_copies(value: torch.Tensor) -> torch.Tensor:
    try:  # Sparse, quantized and nested tensors.
        return value.detach().to("cpu", copy=True)
    except (NotImplementedError, TypeError):  # A class that has no copies cannot be saved, either.
        return value


def _has_no_data(value: torch.Tensor) -> bool:
    return value.is_meta or is_lazy(value) or is_fake(value)


def is_plain(value: torch.Tensor) -> bool:
    """Return whether a tensor has memory of its own, which is one block of its elements."""
    kind = type(value)
    if kind not in (torch.Tensor, torch.nn.Parameter) and (
        is_lazy(value) or kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    ):
        return False
    strided = value.layout is torch.strided and not value.is_nested
    return strided and not value.is_quantized and not value.is_meta


class _Pickler(pickle.Pickler):
    def __init__(self, file: Any, tensors: list[torch.Tensor]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._tensors = tensors

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        self._tensors.append(value)
        return len(self._tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, tensors: list[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> Any:
        return self._tensors[pid]


def _deep_copy(value: Any, pickling: Exception) -> Any:
    """Return a deep copy, after pickling has failed; the value itself if that fails, too."""
    if _is_out_of_memory(pickling):
        raise pickling
    try:
        return copy.deepcopy(value)
    except Exception as error:
        if _is_out_of_memory(error):
            raise
        return value


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether a copy failed for lack of memory.

    Then the value itself must not be used in place of the copy: it may change before it is saved.
    """
    # For its CPU allocator, torch raises a plain RuntimeError.
    return isinstance(error, _OUT_OF_MEMORY_ERRORS) or "allocate memory" in str(error)
