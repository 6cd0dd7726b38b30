"""Training states to save and load, in which every element follows from its position.

The bits of an element are a hash of the name of its tensor and its index in the whole tensor. So
any rank can check any part of any layout without a second copy.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

__all__ = [
    "KINDS",
    "ONE",
    "State",
    "build",
    "check",
    "clear",
    "fill",
    "locals_of",
    "nbytes_of",
    "shapes",
]

State = dict[str, torch.Tensor]

ONE = "weight"
"""The name of the tensor of kind "one"."""

FLOAT, BRAIN = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Kind:
    """The parameters of a transformer, in one or several copies.

    Attributes:
        layers: layers of 6 parameters, 12 width² elements in all.
        copies: a name prefix and a dtype for each copy of a parameter.
    """

    layers: int
    copies: tuple[tuple[str, torch.dtype], ...]

    def width(self, nbytes: int) -> int:
        """Return the width that comes closest to that many bytes and that ranks divide evenly."""
        element = sum(dtype.itemsize for _, dtype in self.copies)
        return max(16, round(math.sqrt(nbytes / (12 * self.layers * element)) / 16) * 16)


ADAMW = (("model", BRAIN), ("master", FLOAT), ("exp_avg", FLOAT), ("exp_avg_sq", FLOAT))
KINDS = {"adamw": Kind(10, ADAMW), "bf16": Kind(40, (("model", BRAIN),))}
"""240 tensors each."""


def shapes(kind: str, amount: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype by name.

    `amount` is the total in bytes; for kind "small", the number of tensors; for "one", the bytes
    of one square tensor.
    """
    if kind == "small":
        return {f"t{number:06d}": ((16,), FLOAT) for number in range(amount)}
    if kind == "one":
        side = max(64, round(math.sqrt(amount / 4) / 64) * 64)
        return {ONE: ((side, side), FLOAT)}
    model = KINDS[kind]
    d = model.width(amount)
    layer = {
        "attn.qkv": (3 * d, d),
        "attn.out": (d, d),
        "mlp.up": (4 * d, d),
        "mlp.down": (d, 4 * d),
        "norm_1": (d,),
        "norm_2": (d,),
    }
    return {
        f"{copy}.layers.{number}.{name}": (shape, dtype)
        for copy, dtype in model.copies
        for number in range(model.layers)
        for name, shape in layer.items()
    }


def build(
    kind: str, amount: int, *, rank: int = 0, mesh: DeviceMesh | None = None, split: str = "rows"
) -> State:
    """Return this rank's part of a state: plain tensors without a mesh, else DTensors on it.

    Args:
        split: "rows" shards the first dimension, "columns" the last one.
    """
    ranks = mesh.size() if mesh is not None else 1
    state: State = {}
    for name, (shape, dtype) in shapes(kind, amount).items():
        dim = 0 if split == "rows" else len(shape) - 1
        sizes = list(shape)
        sizes[dim] //= ranks
        local = torch.empty(sizes, dtype=dtype)
        if mesh is not None:
            stride = torch.empty(shape, device="meta").stride()
            shard = [Shard(dim)]
            state[name] = DTensor.from_local(
                local, mesh, shard, run_check=False, shape=torch.Size(shape), stride=stride
            )
        else:
            state[name] = local
    fill(state, rank)
    return state


def fill(state: State, rank: int) -> None:
    """Set every element to its expected value."""
    for local, expected in _expected(state, rank):
        local.copy_(expected)


def locals_of(state: State) -> State:
    """Return the local tensors of this rank."""
    return {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in state.items()
    }


def nbytes_of(state: State) -> int:
    """Return the bytes that this rank holds."""
    return sum(tensor.nbytes for tensor in locals_of(state).values())


def clear(state: State) -> None:
    for tensor in locals_of(state).values():
        tensor.zero_()


def check(state: State, rank: int) -> None:
    """Raise `AssertionError` unless every element has its expected value."""
    wrong = sum(not torch.equal(local, expected) for local, expected in _expected(state, rank))
    if wrong:
        raise AssertionError(f"{wrong} of {len(state)} tensors differ from what was saved")


def _expected(state: State, rank: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the bits of each local tensor and the expected bits."""
    for name, tensor in state.items():
        local = locals_of({name: tensor})[name].detach()
        first = [0] * tensor.ndim
        if isinstance(tensor, DTensor):
            (shard,) = tensor.placements
            first[shard.dim] = rank * local.shape[shard.dim]
        yield local.view(_BITS[local.element_size()]), _bits(name, tensor.shape, local, first)


_BITS = {2: torch.int16, 4: torch.int32}


def _bits(name: str, shape: torch.Size, local: torch.Tensor, first: list[int]) -> torch.Tensor:
    index = torch.zeros((), dtype=torch.int32)
    for dim, size in enumerate(local.shape):
        along = torch.arange(first[dim], first[dim] + size, dtype=torch.int32)
        index = index.unsqueeze(-1) * shape[dim] + along
    index = index.mul_(0x3779F9B1).add_(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    return index if local.element_size() == 4 else index.bitwise_right_shift_(16).to(torch.int16)
