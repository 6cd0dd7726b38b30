"""Copies from accelerators. On CUDA through pinned memory and side streams (not run so far)."""

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
    """Wait for what the calling thread has given these devices to do on its current streams.

    The threads that copy have streams of their own, and would not wait for it.
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
    """Copy the elements of a tensor of any device, as words, into memory of the CPU.

    They are there on return. On CUDA all of it goes by a side stream: what others are given to do
    meanwhile does not delay it.

    Args:
        into: words (`tensors.memory.words`) of the tensor's shape.
        tensor: may be conjugated or negated lazily: what it shows is copied.
    """
    if tensor.device.type != "cuda":
        into.copy_(_shown(tensor))
        return
    stream = _side_stream(tensor.device)
    with torch.cuda.stream(stream):
        into.copy_(_shown(tensor), non_blocking=True)
    stream.synchronize()


def _shown(tensor: torch.Tensor) -> torch.Tensor:
    return integer_view(tensor.resolve_conj().resolve_neg())


@cache
def _side_stream(device: torch.device) -> Any:
    stream: Any = torch.cuda.Stream
    return stream(device)


def pinned(nbytes: int) -> NDArray[np.uint8]:
    """New memory at a page, locked in its place, so that CUDA copies into it at full speed.

    Where the system locks no more of it, it is ordinary memory, with a warning: slower is better
    than no save.

    Raises:
        RuntimeError: there is not even that.
    """
    room = nbytes + PAGE
    try:
        whole = torch.empty(room, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:  # what torch raises for everything
        whole = torch.empty(room, dtype=torch.uint8)
        why = (str(error).strip() or repr(error)).splitlines()[0]
        warnings.warn(
            f"{nbytes} bytes to stage a save in could not be pinned, so copies from CUDA devices "
            f"are slower: {why}",
            stacklevel=2,
        )
    block: NDArray[np.uint8] = whole.numpy()
    start = -block.ctypes.data % PAGE
    return block[start : start + nbytes]
