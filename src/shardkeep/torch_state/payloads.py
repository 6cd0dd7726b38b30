"""Payloads of a save: bytes of tensors with any strides and device, and of objects."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import mul

import numpy as np
import torch

from shardkeep.io.arena import copy_memory
from shardkeep.io.contract import Payloads
from shardkeep.torch_state.devices import copy_out, finish_work
from shardkeep.torch_state.memory import integer_view
from shardkeep.types import I64

__all__ = ["StatePayloads"]


class StatePayloads(Payloads):
    """Payloads of tensors, in C order, followed by those of objects.

    The tensors must not change or be freed while this is used. The constructor waits for queued
    work of accelerators. It must be called by the thread that queued it: other threads use other
    streams.

    Args:
        tensors: the tensors, on any device, with any strides.
        addresses: [N] the addresses of tensors in CPU memory in C order; 0 for the others.
        objects: the bytes of the objects.

    Attributes:
        addresses: the address of each payload; 0 for a tensor that torch has to copy.
        devices: the devices of the tensors that torch has to copy.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], addresses: I64, objects: Sequence[bytes] = ()
    ) -> None:
        self._tensors, self._objects = tensors, objects
        at = [np.frombuffer(data, np.uint8).ctypes.data for data in objects]
        self.addresses = np.concatenate([addresses, np.array(at, dtype=np.int64)])
        self._addresses: list[int] = self.addresses.tolist()
        self.devices = {tensors[row].device for row in np.flatnonzero(addresses == 0).tolist()}
        finish_work(self.devices)

    def copy(self, row: int, start: int, nbytes: int, address: int) -> None:
        """Copy bytes of a payload, from its byte `start` on, to an address in memory."""
        source = self._addresses[row]
        if not source:
            _copy_strided(self._tensors[row], start, nbytes, address)
        else:
            copy_memory(address, source + start, nbytes)


def _copy_strided(tensor: torch.Tensor, start: int, nbytes: int, address: int) -> None:
    """Copy bytes of a tensor's elements in C order. Only these are moved from the device."""
    itemsize = tensor.element_size()
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    kind = integer_view(torch.empty(0, dtype=tensor.dtype)).dtype
    into = torch.frombuffer(memory, dtype=torch.uint8)
    plain = tensor.detach()
    done = 0
    for slab in slabs(tuple(tensor.shape), start // itemsize, nbytes // itemsize):
        part = plain[slab]
        end = done + part.numel() * itemsize
        copy_out(into[done:end].view(kind).view(part.shape), part)
        done = end


def slabs(shape: tuple[int, ...], first: int, count: int) -> Iterator[tuple[slice, ...]]:
    """Yield boxes that together contain `count` elements of an array, from the `first` one on.

    Elements are counted in C order, and so are the boxes. As the first and the last row may be cut,
    there are up to two boxes for each dimension, and one more.
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
