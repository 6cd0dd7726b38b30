"""Saves and loads that tests run on simulated and on real ranks alike: `function(ranks, *args)`."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from math import prod
from typing import Any

import torch

import shardkeep as sk
from shardkeep.torch_state.placements import Placement, placed_boxes
from shardkeep.types import Box

Layout = tuple[tuple[int, ...], tuple[Placement, ...]]
"""The mesh shape, and a placement for each of its dimensions."""


def values(name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of random bits that depend only on its name, so it is equal on all ranks."""
    made = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    size = prod(shape) * dtype.itemsize
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=made)
    if dtype == torch.bool:
        raw &= 1
    return raw.view(dtype).reshape(tuple(shape))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors are equal bit for bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bits(a) == bits(b)


def bits(tensor: torch.Tensor) -> bytes:
    """Return a tensor's bytes in C order."""
    plain = tensor.detach().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def coordinate(rank: int, mesh: Sequence[int]) -> tuple[int, ...] | None:
    """Return the coordinate of a rank in a mesh of the first ranks; None outside of the mesh."""
    if rank >= prod(mesh):
        return None
    place = []
    for size in reversed(mesh):
        place.append(rank % size)
        rank //= size
    return tuple(reversed(place))


def shard(whole: torch.Tensor, rank: int, layout: Layout, *, empty: bool = False) -> sk.Shards:
    """Return a rank's part of a tensor in a layout: its values, or zeros to be filled."""
    mesh, placements = layout
    here = coordinate(rank, mesh)
    held = () if here is None else placed_boxes(tuple(whole.shape), mesh, here, placements)
    boxes = [part.box for part in held]
    pieces = [(box, whole[box.slices].clone()) for box in boxes]
    if empty:
        pieces = [(box, torch.zeros_like(piece)) for box, piece in pieces]
    return sk.Shards(tuple(whole.shape), pieces, whole.dtype)


Tensor = tuple[str, tuple[int, ...], str, Layout, Layout]
"""Name, shape, dtype, the layout of the save, and the layout of the load."""


def save_layouts(ranks: Any, path: str, tensors: Sequence[Tensor]) -> int:
    """Save tensors in their first layouts; return the number of bytes that this rank wrote."""
    state = {
        name: shard(values(name, shape, getattr(torch, dtype)), ranks.rank, first)
        for name, shape, dtype, first, _ in tensors
    }
    return sk.save(state, path, ranks=ranks).written


def load_layouts(ranks: Any, path: str, tensors: Sequence[Tensor]) -> list[str]:
    """Load into the second layouts; return the names of tensors that differ from the saved ones."""
    state = {
        name: shard(values(name, shape, getattr(torch, dtype)), ranks.rank, second, empty=True)
        for name, shape, dtype, _, second in tensors
    }
    report = sk.load(state, path, ranks=ranks)
    assert set(report.loaded) == {name for name, *_ in tensors}
    wrong = []
    for name, shape, dtype, _, _ in tensors:
        whole = values(name, shape, getattr(torch, dtype))
        fine = all(same(piece, whole[box.slices]) for box, piece in state[name].parts)
        wrong += [] if fine else [name]
    return wrong


def job_state(rank: int, size: int) -> dict[Any, Any]:
    """Return a state with every kind of value of a training job."""
    shared = values("shared", (5, 3), torch.float32)
    weight = values("weight", (size * 2 + 1, 4), torch.bfloat16)
    tied = values("tied", (6, 2), torch.float32)
    rows = [(r * 2, 2 if r < size - 1 else 3) for r in range(size)]
    start, count = rows[rank]
    return {
        "model": {
            "shared": shared,
            "weight": sk.Shards(tuple(weight.shape), [((start, 0), weight[start : start + count])]),
            "embed": tied,
            "head": tied,
            "scalar": torch.tensor(2.5, dtype=torch.float64),
            "none": torch.zeros(0, 7),
        },
        "optim": {
            "state": {
                0: {"step": torch.tensor(3.0)},
                1: {"exp_avg": values("m", (3,), torch.float32)},
            },
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1], "fused": None}],
        },
        "only": {rank: {"tensor": values(f"r{rank}", (2, 2), torch.int16), "note": f"rank {rank}"}},
        "empty": {"dict": {}, "list": [], "tuple": ()},
        True: {None: 1.5, (1, "a"): b"bytes", 2.5: {3: "deep"}},
        "mixed": [torch.ones(2), 7, {"x": torch.zeros(1)}, "text"],
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
        "epoch": 12,
    }


def blank(state: Any) -> Any:
    """Return a template for the state: the same structure with other values."""
    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state)
    if isinstance(state, sk.Shards):
        return sk.Shards(
            state.shape, [(b, torch.zeros_like(t)) for b, t in state.parts], state.dtype
        )
    if isinstance(state, dict):
        return {key: blank(value) for key, value in state.items()}
    if isinstance(state, list) and any(isinstance(x, torch.Tensor | dict) for x in state):
        return [blank(value) for value in state]
    return "not loaded"


def equal(a: Any, b: Any) -> bool:
    """Return whether two states have the same types, keys, order and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return same(a, b)
    if isinstance(a, sk.Shards):
        pairs = zip(a.parts, b.parts, strict=True)
        return all(x == y and same(s, t) for (x, s), (y, t) in pairs)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def round_trip(ranks: Any, path: str) -> dict[str, Any]:
    """Save and load every kind of value; return the figures of the reports."""
    state = job_state(ranks.rank, ranks.size)
    saved = sk.save(state, path, ranks=ranks)
    loaded = blank(state)
    loaded["empty"] = state["empty"]
    report = sk.load(loaded, path, ranks=ranks)
    assert equal(loaded, state), (loaded, state)
    return {
        "tensors": saved.tensors,
        "objects": saved.objects,
        "missing": report.missing,
        "unexpected": report.unexpected,
        "written": saved.written,
        "nbytes": saved.nbytes,
    }


def save_state(ranks: Any, path: str, states: Sequence[dict[Any, Any]], **options: Any) -> str:
    """Save this rank's state; return the id of the save."""
    return sk.save(states[ranks.rank], path, ranks=ranks, **options).save_id


def refused(ranks: Any, path: str, states: Sequence[dict[Any, Any]]) -> tuple[str, str]:
    """Save contradictory states; return the error of this rank."""
    try:
        sk.save(states[ranks.rank], path, ranks=ranks)
    except sk.ShardkeepError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def part(shape: Sequence[int], box: Box) -> sk.Shards:
    """Return zeros in one box of a tensor."""
    return sk.Shards(shape, [(box, torch.zeros(box.sizes))])
