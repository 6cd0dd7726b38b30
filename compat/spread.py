"""Sharded tensors: create templates of them, and gather them into one description.

A rank's part is right if its bits equal those of this release's own DTensor of the true values.
This module is imported by scripts that run inside other releases.
"""

from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from templates import Node, Spread, Template, golden


def spreader(kind: str, ranks: int) -> Spread:
    """Shard whole tensors as "dtensor" or "sharded_tensor"."""
    # Dtypes that gloo can send.
    sent = {torch.float32} if golden.RELEASE < (2, 3) else {torch.float32, torch.int64}

    def dtensor(path: str, tensor: torch.Tensor) -> Any:
        mesh = golden.cpu_mesh(list(range(ranks)))
        dims = [dim for dim, size in enumerate(tensor.shape) if size >= ranks]
        if tensor.dtype not in sent or not dims or not tensor.numel():
            return None
        choice = zlib.crc32(path.encode()) % (len(dims) + 1)
        shard, replicate = golden.dtensor_name("Shard"), golden.dtensor_name("Replicate")
        place = shard(dims[choice]) if choice < len(dims) else replicate()
        return golden.dtensor_name("distribute_tensor")(tensor, mesh, [place])

    def sharded_tensor(path: str, tensor: torch.Tensor) -> Any:
        dims = [dim for dim, size in enumerate(tensor.shape) if size >= ranks]
        if tensor.dtype != torch.float32 or not dims:
            return None
        dim = dims[zlib.crc32(path.encode()) % len(dims)]
        return golden.sharded_tensor(tensor, dim, ranks=ranks)

    return {"dtensor": dtensor, "sharded_tensor": sharded_tensor}[kind]


def local_parts(value: Any) -> list[torch.Tensor]:
    """Return the part of a sharded tensor that this rank holds."""
    if hasattr(value, "local_shards"):
        return [shard.tensor for shard in value.local_shards()]
    return [value.to_local()]


def gather(made: Template, state: Any) -> Any:
    """Replace each sharded tensor by a description: that of the whole, if every part is right."""
    mine = [
        [golden.bytes_of(part) for part in local_parts(blank)]
        == [golden.bytes_of(part) for part in local_parts(truth)]
        for blank, truth, _ in made.truths
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    nodes: dict[int, Node] = {}
    for i, (blank, _, node) in enumerate(made.truths):
        wrong = [rank for rank, fine in enumerate(everyone) if not fine[i]]
        nodes[id(blank)] = {"kind": "wrong_on_ranks", "ranks": wrong} if wrong else node
    return _replace(state, nodes)


def agree(node: Node) -> None:
    """Check that all ranks have loaded the same state, since only rank 0 reports it."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, zlib.crc32(json.dumps(node).encode()))
    if len(set(everyone)) > 1:
        raise AssertionError("the ranks have loaded different values")


@dataclass(frozen=True)
class Described:
    """A value whose description is known already."""

    node: Node


def _replace(state: Any, nodes: dict[int, Node]) -> Any:
    if id(state) in nodes:
        return Described(nodes[id(state)])
    if type(state) in (dict, OrderedDict):
        return type(state)((key, _replace(value, nodes)) for key, value in state.items())
    return [_replace(value, nodes) for value in state] if type(state) is list else state


def describe(state: Any) -> Node:
    """Return the golden description of a value, also if it contains `Described` values."""
    if isinstance(state, Described):
        return state.node
    if isinstance(state, dict):
        pairs = [[golden.describe(key), describe(value)] for key, value in state.items()]
        return {"kind": "dict", "type": type(state).__name__, "items": pairs}
    if type(state) is list:
        return {"kind": "list", "items": [describe(value) for value in state]}
    return golden.describe(state)
