"""A tensor's memory as raw words: out to files, and in from them. No dtype is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shardkeep.errors import Mismatch
from shardkeep.types import DTYPES, I64, Box, DType

__all__ = [
    "Destinations",
    "destination",
    "integer_view",
    "is_contiguous_on_cpu",
    "memory_array",
    "payload_bytes",
]

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
_UNSIGNED: dict[int, np.dtype[Any]] = {size: np.dtype(f"u{size}") for size in (2, 4, 8)}


def memory_array(tensor: torch.Tensor) -> NDArray[Any]:
    """A writable view of a CPU tensor's memory; no copy.

    Returns:
        An array of the tensor's shape and strides, of words as wide as its elements: uint8, uint16,
        uint32, uint64, or complex128 for 16 bytes. It keeps the memory alive.

    Raises:
        ValueError: the tensor is not on the CPU, or its memory is not what it shows (conjugated or
            negated lazily, quantized).
    """
    if tensor.device.type != "cpu" or tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"no plain memory: a tensor on {tensor.device}, or with a conj or neg bit")
    array: NDArray[Any] = integer_view(tensor).numpy()
    unsigned = _UNSIGNED.get(array.itemsize)
    return array if unsigned is None else array.view(unsigned)


def integer_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, or complex128, that torch can move whatever the dtype is.

    Raises:
        ValueError: the tensor is quantized.
    """
    if tensor.is_quantized:  # Packed ones have less memory than their shape says.
        raise ValueError(f"no plain memory: a quantized tensor ({tensor.dtype})")
    return tensor.detach().view(_WORDS[tensor.element_size()])


def payload_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements in C order, as bytes: a view where they lie so on the CPU already."""
    plain = tensor.detach()
    if plain.device.type != "cpu":
        plain = plain.cpu()
    # As words: torch can't copy every dtype, and makes 1 of the bytes of a bool.
    moved = integer_view(plain.resolve_conj().resolve_neg()).contiguous()
    flat: NDArray[Any] = moved.numpy().reshape(-1)
    return flat.view(np.uint8).data


def destination(tensor: torch.Tensor, dtype: DType) -> tuple[NDArray[Any], Callable[[], None]]:
    """Where the bytes go that a load reads for `tensor`.

    Args:
        tensor: to be filled; any device, strides and dtype, a leaf that requires grad as well.
        dtype: what the bytes are: the stored dtype.

    Returns:
        An array with the tensor's shape, as from `memory_array`, to be filled, and a function to
        call after that. The array is the tensor's own memory where that is possible. Otherwise it
        is a buffer, which the function moves (and casts) into the tensor.

    Raises:
        Mismatch: this torch does not have the dtype, or can't cast it (raised by the call).
    """
    stored = _stored(dtype)
    if _takes_bytes(tensor, stored):
        return memory_array(tensor), _nothing
    buffer = torch.empty(tuple(tensor.shape), dtype=stored)
    return memory_array(buffer), lambda: _fill(tensor, buffer)


def _stored(dtype: DType) -> torch.dtype:
    """Torch's own; Mismatch if this torch does not have it."""
    found = getattr(torch, dtype.name, None)
    if not isinstance(found, torch.dtype):
        raise Mismatch(f"torch {torch.__version__} has no dtype {dtype}")
    return found


def _takes_bytes(tensor: torch.Tensor, stored: torch.dtype) -> bool:
    """Whether elements of that dtype can be read to where the tensor's own are."""
    lazy = tensor.is_conj() or tensor.is_neg()
    return tensor.device.type == "cpu" and tensor.dtype == stored and not lazy


def _fill(tensor: torch.Tensor, buffer: torch.Tensor) -> None:
    """Move and cast; Mismatch if that can't be done."""
    # Inference tensors change in inference mode only. It sets the grad mode, even to leave it.
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        try:
            tensor.copy_(buffer)
        except (RuntimeError, NotImplementedError) as error:
            dtypes = f"{str(buffer.dtype).removeprefix('torch.')} to {tensor.dtype}"
            raise Mismatch(f"can't cast {dtypes}: {error}") from error


def is_contiguous_on_cpu(tensor: torch.Tensor) -> bool:
    """Whether a plain tensor's elements lie in memory of the CPU as they are, in C order."""
    return tensor.is_contiguous() and tensor.is_cpu and not tensor.is_conj() and not tensor.is_neg()


def _has_memory(tensor: torch.Tensor, nbytes: int) -> bool:
    """Whether a storage still has what a tensor shows: it may have been made smaller, or given back
    (as FSDP does).
    """
    first = tensor.storage_offset()
    begin = first * tensor.element_size() if first else 0
    return begin + nbytes <= tensor.untyped_storage().nbytes()


class Destinations:
    """Where a load puts what it reads for many tensors, by their rows: a `filling.Memory`.

    Args:
        tensors: [N] to be filled.
        addresses: [N] where one's elements lie in order, of the dtype that is stored; else 0.
        codes: [N] of the dtypes that are stored.
        nbytes: [N] what is stored of each.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        addresses: I64,
        codes: NDArray[np.uint8],
        nbytes: I64,
    ) -> None:
        self._tensors, self._addresses = tensors, addresses
        self._codes, self._nbytes = codes, nbytes

    def addresses(self, rows: I64) -> I64:
        """[R] those of these rows; 0 also for one whose memory is not all there."""
        tensors = map(self._tensors.__getitem__, rows.tolist())
        there = map(_has_memory, tensors, self._nbytes[rows].tolist())
        return np.where(np.fromiter(there, np.bool_, len(rows)), self._addresses[rows], 0)

    def array(self, row: int) -> NDArray[Any] | None:
        """Return the memory of a tensor; None if the data has to be moved there, or cast.

        Raises:
            Mismatch: this torch does not have the dtype.
        """
        tensor = self._tensors[row]
        return memory_array(tensor) if _takes_bytes(tensor, self._dtype(row)) else None

    def put(self, row: int, part: Box, data: NDArray[np.uint8]) -> None:
        """Move and cast part of what is stored for a tensor. Mismatch if that can't be done."""
        found = torch.from_numpy(data).view(self._dtype(row)).reshape(part.sizes)
        place: tuple[Any, ...] = (*part.slices, ...)  # a view, even of a scalar
        _fill(self._tensors[row].detach()[place], found)

    def _dtype(self, row: int) -> torch.dtype:
        return _stored(DTYPES[self._codes[row]])


def _nothing() -> None:
    """The bytes are where they belong."""
