"""Access to the memory of tensors of every dtype: reading it for a save, filling it in a load."""

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

_MOVABLE_DTYPES = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}
_UNSIGNED_DTYPES: dict[int, np.dtype[Any]] = {size: np.dtype(f"u{size}") for size in (2, 4, 8)}


def memory_array(tensor: torch.Tensor) -> NDArray[Any]:
    """Return a writable view of a CPU tensor's memory, without a copy.

    Returns:
        An array with the tensor's shape and strides. Its elements have the size of the tensor's:
        uint8, uint16, uint32, uint64, or complex128 for 16 bytes. It keeps the memory alive.

    Raises:
        ValueError: the tensor is not on the CPU, or its memory differs from its values (it is
            conjugated or negated lazily, or quantized).
    """
    if tensor.device.type != "cpu" or tensor.is_conj() or tensor.is_neg():
        raise ValueError(
            f"the memory of a tensor on {tensor.device} cannot be viewed: it must be on the CPU, "
            "and neither conjugated nor negated lazily"
        )
    array: NDArray[Any] = integer_view(tensor).numpy()
    unsigned = _UNSIGNED_DTYPES.get(array.itemsize)
    return array if unsigned is None else array.view(unsigned)


def integer_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of the same memory as integers, which torch can move whatever the dtype is.

    Elements of 16 bytes are viewed as complex128.

    Raises:
        ValueError: the tensor is quantized.
    """
    if tensor.is_quantized:  # Packed ones have less memory than their shape suggests.
        raise ValueError(f"the memory of a quantized tensor ({tensor.dtype}) cannot be viewed")
    return tensor.detach().view(_MOVABLE_DTYPES[tensor.element_size()])


def payload_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor's elements in C order: a view of its memory if possible."""
    plain = tensor.detach()
    if plain.device.type != "cpu":
        plain = plain.cpu()
    # As integers: torch cannot copy every dtype, and changes the bytes of a bool to 0 and 1.
    moved = integer_view(plain.resolve_conj().resolve_neg()).contiguous()
    flat: NDArray[Any] = moved.numpy().reshape(-1)
    return flat.view(np.uint8).data


def destination(tensor: torch.Tensor, dtype: DType) -> tuple[NDArray[Any], Callable[[], None]]:
    """Return an array for the bytes that a load reads for a tensor.

    Args:
        tensor: the tensor to fill. It may have any device, strides and dtype, and may be a leaf
            that requires grad.
        dtype: the dtype of the stored bytes.

    Returns:
        An array with the tensor's shape, as from `memory_array`, to be filled, and a function to
        call after that. The array is the tensor's own memory where that is possible. Otherwise it
        is a buffer, which the function moves (and casts) into the tensor.

    Raises:
        Mismatch: this release of torch does not have the dtype, or cannot cast it (raised by the
            returned function).
    """
    stored = _torch_dtype(dtype)
    if _takes_bytes(tensor, stored):
        return memory_array(tensor), _nothing
    buffer = torch.empty(tuple(tensor.shape), dtype=stored)
    return memory_array(buffer), lambda: _fill(tensor, buffer)


def _torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's dtype; `Mismatch` if this release does not have it."""
    found = getattr(torch, dtype.name, None)
    if not isinstance(found, torch.dtype):
        raise Mismatch(
            f"torch {torch.__version__} has no dtype {dtype}, which the checkpoint was saved with; "
            "use a newer release"
        )
    return found


def _takes_bytes(tensor: torch.Tensor, stored: torch.dtype) -> bool:
    """Return whether elements of that dtype can be read directly into the tensor's memory."""
    lazy = tensor.is_conj() or tensor.is_neg()
    return tensor.device.type == "cpu" and tensor.dtype == stored and not lazy


def _fill(tensor: torch.Tensor, buffer: torch.Tensor) -> None:
    """Copy the buffer into the tensor, with a cast; `Mismatch` if torch cannot cast it."""
    # Inference tensors can be changed only in inference mode. Entering either mode sets the grad
    # mode, so it comes first.
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        try:
            tensor.copy_(buffer)
        except (RuntimeError, NotImplementedError) as error:
            dtypes = f"{str(buffer.dtype).removeprefix('torch.')} to {tensor.dtype}"
            raise Mismatch(f"torch cannot cast {dtypes}: {error}") from error


def is_contiguous_on_cpu(tensor: torch.Tensor) -> bool:
    """Return whether a plain tensor's values are in CPU memory, in C order, as they are."""
    return tensor.is_contiguous() and tensor.is_cpu and not tensor.is_conj() and not tensor.is_neg()


def _has_memory(tensor: torch.Tensor, nbytes: int) -> bool:
    """Return whether a tensor's storage still has all of its memory: FSDP frees or shrinks some."""
    first = tensor.storage_offset()
    begin = first * tensor.element_size() if first else 0
    return begin + nbytes <= tensor.untyped_storage().nbytes()


class Destinations:
    """The memory of many tensors that a load fills, by row number.

    Args:
        tensors: [N] the tensors to fill.
        addresses: [N] the address of a tensor's memory if stored bytes can be read into it as they
            are: it is contiguous, on the CPU, and has the stored dtype. Otherwise 0.
        codes: [N] the codes of the stored dtypes.
        nbytes: [N] the number of stored bytes of each tensor.
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
        """Return the addresses of these rows; 0 also for a tensor whose storage is incomplete."""
        tensors = map(self._tensors.__getitem__, rows.tolist())
        there = map(_has_memory, tensors, self._nbytes[rows].tolist())
        return np.where(np.fromiter(there, np.bool_, len(rows)), self._addresses[rows], 0)

    def array(self, row: int) -> NDArray[Any] | None:
        """Return the memory of a tensor; None if the data has to be moved there, or cast.

        Raises:
            Mismatch: this release of torch does not have the dtype.
        """
        tensor = self._tensors[row]
        return memory_array(tensor) if _takes_bytes(tensor, self._dtype(row)) else None

    def put(self, row: int, part: Box, data: NDArray[np.uint8]) -> None:
        """Copy part of the stored data into a tensor, with a cast; `Mismatch` if that fails."""
        found = torch.from_numpy(data).view(self._dtype(row)).reshape(part.sizes)
        place: tuple[Any, ...] = (
            *part.slices,
            ...,
        )  # The ellipsis makes it a view even of a scalar.
        _fill(self._tensors[row].detach()[place], found)

    def _dtype(self, row: int) -> torch.dtype:
        return _torch_dtype(DTYPES[self._codes[row]])


def _nothing() -> None:
    """Do nothing: the bytes were read into the tensor itself."""
