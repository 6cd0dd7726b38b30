"""The state of a checkpoint in full, without a template."""

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
    """Return the state of a checkpoint, or a part of it, nested as it was saved, on the CPU.

    Names that share one payload in the checkpoint share one tensor.

    Args:
        source: the checkpoint.
        keys: flat names, or names of containers; by default all. Elements of lists that are left
            out become None.
        trust: classes, as "module.Class", that objects may be built of.

    Raises:
        Untrusted: an object holds a class that is not trusted.
        Mismatch: this release of torch lacks the dtype of a tensor.
        Damaged, FormatError: bytes are missing, changed or malformed.
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
            # Only the item has the scale and the zero point.
            made[name] = decode(source.item_bytes(name))
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
    """Return the part of a structure that is under these names."""

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
