"""The bytes of what a rank saves, where they lie: tensors of any strides and device, objects."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import numpy as np
import torch

from shardkeep.io.contract import Payloads
from shardkeep.torch_state.devices import copy_out, finish_work
from shardkeep.torch_state.memory import integer_view
from shardkeep.types import I64

__all__ = ["StatePayloads"]

_SMALL = 64 * 1024
"""Bytes that are copied without giving up the interpreter's lock: quicker than to take it back."""

# Called through a library, memcpy gives up the interpreter's lock; ctypes.memmove does not.
_memcpy: Any = ctypes.CDLL(None).memcpy
_memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcpy.restype = None


class StatePayloads(Payloads):
    """Payloads of tensors, in C order, and after them of objects (`io.contract.Payloads`).

    Tensors must not be freed or change as long as this is used. What accelerators are to do before
    is waited for here, by the thread whose stream it is on: others would not see it.

    Args:
        tensors: on any device, with any strides.
        addresses: [N] where those lie that are in memory of the CPU in C order; 0 for others.
        objects: the bytes of their items.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], addresses: I64, objects: Sequence[bytes] = ()
    ) -> None:
        self._tensors, self._objects = tensors, objects
        at = [np.frombuffer(data, np.uint8).ctypes.data for data in objects]
        self.addresses = np.concatenate([addresses, np.array(at, dtype=np.int64)])
        self._addresses: list[int] = self.addresses.tolist()
        self.devices = {tensors[row].device for row in np.flatnonzero(addresses == 0).tolist()}
        """Of the tensors that have to be copied by torch."""
        finish_work(self.devices)

    def copy(self, row: int, start: int, nbytes: int, address: int) -> None:
        """Copy bytes of one payload, from its byte `start` on, to an address in memory."""
        source = self._addresses[row]
        if not source:
            _copy_strided(self._tensors[row], start, nbytes, address)
        elif nbytes <= _SMALL:
            ctypes.memmove(address, source + start, nbytes)
        else:
            _memcpy(address, source + start, nbytes)


def _copy_strided(tensor: torch.Tensor, start: int, nbytes: int, address: int) -> None:
    """Copy bytes of the tensor's elements in C order: no more of it than these is ever moved."""
    itemsize = tensor.element_size()
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    kind = integer_view(torch.empty(0, dtype=tensor.dtype)).dtype
    into = torch.frombuffer(memory, dtype=torch.uint8)
    plain = tensor.detach()
    done = 0
    for place in slabs(tuple(tensor.shape), start // itemsize, nbytes // itemsize):
        part = plain[place]
        end = done + part.numel() * itemsize
        copy_out(into[done:end].view(kind).view(part.shape), part)
        done = end


def slabs(shape: tuple[int, ...], first: int, count: int) -> Iterator[tuple[slice, ...]]:
    """Boxes that hold `count` elements of an array, from the `first` one on in C order, in order.

    At most two for each dimension and one more, as rows at either end may be cut.
    """
    if not count:
        return
    if not shape:
        yield ()
        return
    below = list(accumulate(reversed(shape[1:]), mul, initial=1))[-1]
    row, inside = divmod(first, below)
    if inside or count < below:
        part = min(count, below - inside)
        for rest in slabs(shape[1:], inside, part):
            yield (slice(row, row + 1), *rest)
        yield from slabs(shape, first + part, count - part)
        return
    rows = count // below
    yield (slice(row, row + rows), *(slice(None) for _ in shape[1:]))
    yield from slabs(shape, first + rows * below, count - rows * below)
