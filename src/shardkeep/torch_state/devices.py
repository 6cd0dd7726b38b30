"""Copies from accelerators. On CUDA through pinned memory and side streams (not tested so far)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shardkeep.settings import PAGE
from shardkeep.torch_state.memory import integer_view

__all__ = ["copy_out", "finish_work", "pinned"]


def finish_work(devices: Iterable[torch.device]) -> None:
    """Wait for the work that the calling thread has queued on its current streams.

    The threads that copy have streams of their own, which would not wait for it.
    """
    for device in devices:
        if device.type in ("cpu", "meta"):
            continue
        module: Any = getattr(torch, device.type, None)
        if hasattr(module, "current_stream"):
            module.current_stream(device).synchronize()
        elif hasattr(module, "synchronize"):
            module.synchronize(device)


def copy_out(into: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy the elements of a tensor on any device to CPU memory, and wait until they are there.

    On CUDA, the copy uses a side stream, so that work on other streams does not delay it.

    Args:
        into: a CPU tensor with the tensor's shape and the dtype of its `integer_view`.
        tensor: the tensor. It may be conjugated or negated lazily: its visible values are copied.
    """
    if tensor.device.type != "cuda":
        into.copy_(_visible_values(tensor))
        return
    stream = _side_stream(tensor.device)
    with torch.cuda.stream(stream):
        into.copy_(_visible_values(tensor), non_blocking=True)
    stream.synchronize()


def _visible_values(tensor: torch.Tensor) -> torch.Tensor:
    return integer_view(tensor.resolve_conj().resolve_neg())


@cache
def _side_stream(device: torch.device) -> Any:
    stream: Any = torch.cuda.Stream
    return stream(device)


def pinned(nbytes: int) -> NDArray[np.uint8]:
    """Return new page-aligned memory that is pinned, so that CUDA copies into it at full speed.

    If the system cannot pin it, the memory is ordinary, and a warning says so: a slow save is
    better than none.

    Raises:
        RuntimeError: there is no memory at all.
    """
    allocated = nbytes + PAGE
    try:
        whole = torch.empty(allocated, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:  # torch raises it for everything.
        whole = torch.empty(allocated, dtype=torch.uint8)
        why = (str(error).strip() or repr(error)).splitlines()[0]
        warnings.warn(
            f"{nbytes} bytes to stage a save in could not be pinned, so copies from CUDA devices "
            f"are slower: {why}",
            stacklevel=2,
        )
    block: NDArray[np.uint8] = whole.numpy()
    start = -block.ctypes.data % PAGE
    return block[start : start + nbytes]
