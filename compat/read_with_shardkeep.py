"""Load checkpoints with Shardkeep on the torch that runs this script, into other placements.

    python read_with_shardkeep.py CHECKPOINTS OUT

The counterpart of `read_with_torch.py`: the same cases, templates and answers. Started once a rank,
tensors are spread over meshes of one and two dimensions, in placements that nobody saved them in;
models of FSDP2 and tensor parallelism are built with another plan.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import pathlib
import zlib
from typing import Any

import read_with_torch as reading
import torch
from spread import agree, describe, gather
from templates import Node, Spread, Template, golden, inverted, plain, tensor_of
from templates import known as known_here

import shardkeep as sk

SPREAD = (torch.float32, torch.int64, torch.bfloat16)
"""Dtypes that gloo can send in every release; tensors of other dtypes are not sharded."""

TRUSTED = ["make.*", "http.HTTPStatus", "builtins.len", "builtins.int"]
"""The contents of the case `objects` that need trust: classes of the script, an enumeration, a
function, a type.
"""


def load(state: Any, path: pathlib.Path, flatten: bool) -> Any:
    """Fill the state in place; raise an error for missing or refused values."""
    sk.load(state, path, trust=TRUSTED)
    return state


def known(name: str) -> str | None:
    """Return why Shardkeep can't load a tensor of a dtype, or None."""
    if name in ("quint4x2", "quint2x4"):
        return f"torch.{name} comes back as a stand-in"
    return known_here(name)


def spreader(ranks: int) -> Spread:
    """Return placements by a tensor's name, with uneven and empty shards among them."""
    meshes = {1: golden.cpu_mesh(list(range(ranks)))}
    square = torch.arange(ranks).reshape(-1, 2).tolist()
    meshes[2] = golden.cpu_mesh(square)

    def spread(path: str, tensor: torch.Tensor) -> Any:
        if tensor.dtype not in SPREAD or not tensor.ndim or not tensor.numel():
            return None
        choice = zlib.crc32(path.encode())
        width = 1 + choice % 2
        kinds: list[Any] = [*range(tensor.ndim), "r"]
        pairs = list(itertools.product(kinds, repeat=width))
        if golden.RELEASE < (2, 5):  # there, DTensors do not record how one dimension is cut twice
            pairs = [pair for pair in pairs if len(set(pair)) == width or pair[0] == "r"]
        places = pairs[choice // 2 % len(pairs)]
        shard, replicate = golden.dtensor_name("Shard"), golden.dtensor_name("Replicate")
        chosen = [replicate() if place == "r" else shard(place) for place in places]
        return golden.dtensor_name("distribute_tensor")(tensor, meshes[width], chosen)

    return spread


def strided_template(expected: Node, ranks: int) -> Template:
    """Return FSDP2 around tensor parallelism, each layer split the other way than when saved."""
    node = {plain(key): value for key, value in expected["items"]}["model"]
    tensors = {plain(key): tensor_of(value) for key, value in node["items"]}
    blank, truth = (
        _parallel(ranks, {name: change(value) for name, value in tensors.items()})
        for change in (inverted, torch.clone)
    )
    nodes = {plain(key): value for key, value in node["items"]}
    truths = [(blank[name], truth[name], nodes[name]) for name in blank]
    state = {"model": {name: blank[name] for name in nodes}}
    return Template(state, expected, [], truths)


def _parallel(ranks: int, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    fully_shard = golden.first_of(
        "torch.distributed.fsdp:fully_shard", "torch.distributed._composable.fsdp:fully_shard"
    )
    parallel = importlib.import_module("torch.distributed.tensor.parallel")
    mesh = golden.cpu_mesh(torch.arange(ranks).reshape(-1, 2).tolist(), ("dp", "tp"))
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    model.load_state_dict(tensors)
    plan = {"0": parallel.RowwiseParallel(), "2": parallel.ColwiseParallel()}
    parallel.parallelize_module(model, mesh["tp"], plan)
    fully_shard(model, mesh=mesh["dp"])
    return dict(model.state_dict())


def read_strided(folder: pathlib.Path, ranks: int) -> Node:
    """Read the case `tp_fsdp2` into strided shards."""
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    try:
        made = strided_template(expected, ranks)
        state = describe(gather(made, load(made.state, folder / "ckpt", True)))
        agree(state)
        return {"state": state, "expected": expected, "spread": len(made.truths)}
    except Exception as error:
        return {"why": golden.reason(error), "expected": expected}


def main() -> None:
    chosen = reading.arguments((__doc__ or "").partition("\n")[0]).parse_args()
    rank, ranks = reading.join()
    spread = spreader(ranks) if ranks > 1 else None
    for folder in reading.cases(chosen.checkpoints.resolve(), chosen.cases):
        content = reading.read_case(folder, spread, load, [known])
        if rank == 0:
            reading.answer(chosen.out, folder.name, content)
        if spread and folder.name == "tp_fsdp2":
            content = read_strided(folder, ranks)
            if rank == 0:
                reading.answer(chosen.out, "tp_fsdp2 (strided)", content)
    reading.leave()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
