"""A checkpoint's state without a template: whole, on the CPU, nested as it was saved."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch

from shardkeep.checkpoint.reader import CheckpointReader, Request
from shardkeep.errors import Mismatch
from shardkeep.state.flatten import unflatten
from shardkeep.torch_state.memory import destination
from shardkeep.torch_state.objects import TORCH_MAKERS, from_bytes
from shardkeep.types import Box, Path, Structure

__all__ = ["read_full_state"]


def read_full_state(
    source: CheckpointReader, *, keys: Collection[str] | None = None, trust: Sequence[str] = ()
) -> Any:
    """Everything that a checkpoint holds, or part of it, with containers and keys as they were.

    Tensors that are one payload in the checkpoint are one tensor.

    Args:
        source: the checkpoint.
        keys: flat names to read, or those of containers around them; by default all. Places of
            lists that are left out become None.
        trust: classes, as "module.Class", that objects may be built of.

    Raises:
        Untrusted: an object holds a class that was not trusted.
        Mismatch: this torch has no dtype that a tensor is of.
        Damaged, FormatError: what is wrong with the files.
    """
    structure = source.structure if keys is None else _part(source.structure, keys)
    made: dict[str, Any] = {}
    tied: dict[Any, torch.Tensor] = {}
    requests = []
    for name in structure.leaves:
        decode = partial(from_bytes, name=name, trust=trust)
        if not source.is_tensor(name):
            made[name] = source.value(name, makers=TORCH_MAKERS, decode=decode)
            continue
        dtype, shape = source.dtype_and_shape(name)
        if dtype.name.startswith(("qint", "quint")):
            made[name] = decode(
                source.item_bytes(name)
            )  # Only the item knows scale and zero point.
            continue
        info = source.tensor(name)
        place = (dtype, shape, info.chunks) if info.chunks else name
        if place not in tied:
            tied[place] = _empty(name, dtype.name, shape)
            array, _ = destination(tied[place], dtype)
            requests.append(Request(name, Box.whole(shape), array))
        made[name] = tied[place]
    source.fill(requests)
    return unflatten(structure, made)


def _empty(name: str, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise Mismatch(f"tensor {name!r}: torch {torch.__version__} has no dtype {dtype}")
    return torch.empty(shape, dtype=kind)


def _part(structure: Structure, keys: Collection[str]) -> Structure:
    """What is under these names, in the containers that it takes."""

    def wanted(path: Path) -> bool:
        return any(".".join(map(str, path[:end])) in keys for end in range(1, len(path) + 1))

    leaves = {name: path for name, path in structure.leaves.items() if name in keys or wanted(path)}
    around = {path[:end] for path in leaves.values() for end in range(len(path))}
    containers = {
        path: kind
        for path, kind in structure.containers.items()
        if not path or path in around or wanted(path)
    }
    return Structure(leaves, containers)
