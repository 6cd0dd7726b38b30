"""Load checkpoints with the torch that runs this script, and describe what came back.

    python read_with_torch.py CHECKPOINTS OUT [--torch-save] [--cases NAME ...]

Stands alone: any torch from 2.0 on, numpy, and no shardkeep. `CHECKPOINTS/<case>/` holds `ckpt` and
`expected.json`; for each case, `OUT/<case>.json` says what this release's own loader made of it,
in the words of `expected.json`. Nothing is judged here.

Started once a rank (RANK, WORLD_SIZE and MASTER_PORT are set), tensors are loaded into DTensors or
ShardedTensors that spread over the ranks; a part is right if it has the bits that this release's
own DTensor of the true values has there.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime
import io
import itertools
import json
import os
import pathlib
import sys
import tempfile
import traceback
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "tests" / "golden"
sys.path.insert(0, str(GOLDEN))

import make as golden  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402

Node = dict[str, Any]
Spread = Callable[[str, torch.Tensor], Any]
"""Name and true value of a tensor -> the same as this rank holds it; None leaves it whole."""

SENTINEL = "to be replaced"
"""Stands in templates where a plain value is to come."""

UNFLATTENED = "no_flatten"
"""Cases of this name hold each top-level value as one leaf, and have to be loaded like that."""


class _Absent:
    """What this release cannot hold."""


ABSENT = _Absent()


# --------------------------------------------------------------------------------------------------
# Templates


@dataclass
class Template:
    """A state to be filled, and what is known about it."""

    state: Any
    expected: Node
    """What is to come back: the case's expectation without what this release cannot hold."""
    left_out: list[str]
    truths: list[tuple[Any, Any, Node]]
    """Spread tensors: the template, the same with the true values, and the whole tensor's node."""


def template(expected: Node, judge: Judge, spread: Spread | None = None) -> Template:
    """A template for a whole state; every bit of its tensors is wrong."""
    made = Template(None, {}, [], [])
    state, pruned = _template(expected, "", made, judge, spread)
    made.state, made.expected = state, pruned
    return made


def _template(
    node: Node, path: str, into: Template, judge: Judge, spread: Spread | None
) -> tuple[Any, Node]:
    kind = node["kind"]
    if kind == "dict":
        pairs = []
        state: Any = OrderedDict() if node["type"] == "OrderedDict" else {}
        for key, value in node["items"]:
            inner, pruned = _template(value, f"{path}.{_text(key)}", into, judge, spread)
            if inner is not ABSENT:
                state[plain(key)] = inner
                pairs.append([key, pruned])
        return state, {**node, "items": pairs}
    if kind == "list" and any(item["kind"] in ("tensor", "dict", "list") for item in node["items"]):
        items = [
            _template(item, f"{path}.{i}", into, judge, spread)
            for i, item in enumerate(node["items"])
        ]
        return [state for state, _ in items], {**node, "items": [pruned for _, pruned in items]}
    lacking = lacks(node, judge)
    if lacking:
        into.left_out.append(f"{path[1:]}: {lacking}")
        return ABSENT, node
    if kind == "tensor" and "quantizer" not in node:
        truth = tensor_of(node)
        part = spread(path, truth) if spread else None
        if part is None:
            return inverted(truth), node
        blank = spread(path, inverted(truth))
        into.truths.append((blank, part, node))
        return blank, node
    return SENTINEL, node


Judge = Callable[[str], str | None]
"""A dtype's name -> why this release cannot have tensors of it; None if it can."""


def known(name: str) -> str | None:
    """The dtype exists."""
    return None if hasattr(torch, name) else f"no torch.{name}"


def storable(name: str) -> str | None:
    """The release can itself save and load it, not only name it."""
    if not hasattr(torch, name) or name.startswith("q"):
        return known(name)  # quantized ones are objects: every release saves those that it has
    file = io.BytesIO()
    try:
        torch.save(torch.empty(2, dtype=getattr(torch, name)), file)
        file.seek(0)
        torch.load(file)
    except Exception:
        return f"torch.{name} cannot be saved by this release itself"
    return None


def lacks(node: Any, judge: Judge) -> str | None:
    """Why this release cannot have some tensor of a node."""
    if isinstance(node, dict):
        if node.get("kind") == "tensor":
            return judge(node["dtype"])
        return next(filter(None, (lacks(part, judge) for part in node.values())), None)
    if isinstance(node, (list, tuple)):
        return next(filter(None, (lacks(part, judge) for part in node)), None)
    return None


def tensor_of(node: Node) -> torch.Tensor:
    """The tensor that a node describes."""
    data = bytearray(base64.b64decode(node["data"]))
    dtype = getattr(torch, node["dtype"])
    if not data:
        return torch.empty(node["shape"], dtype=dtype)
    raw = torch.frombuffer(data, dtype=torch.uint8).clone()
    packed = node["dtype"].startswith("float4")
    return (
        raw.view(dtype).reshape(node["shape"])
        if not packed
        else raw.view(dtype).view(node["shape"])
    )


def inverted(tensor: torch.Tensor) -> torch.Tensor:
    """The same with every bit wrong: what a load forgets to write is found."""
    if tensor.dtype == torch.bool:
        return ~tensor
    if not tensor.numel():
        return tensor.clone()
    raw = tensor.reshape(-1).view(torch.uint8)
    return (255 - raw).view(tensor.dtype).reshape(tensor.shape)


def plain(node: Node) -> Any:
    """The Python value of a node that is a key."""
    if node["kind"] == "tuple":
        return tuple(plain(item) for item in node["items"])
    return base64.b64decode(node["data"]) if node["kind"] == "bytes" else node["value"]


def _text(node: Node) -> str:
    return str(plain(node))


# --------------------------------------------------------------------------------------------------
# Loading with this release's own functions


def stock_load(state: Any, path: pathlib.Path, flatten: bool) -> Any:
    """Fill a state; returns where this release has put what it loaded."""
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=flatten)
    reader = dcp.FileSystemReader(str(path))
    alone = not dist.is_initialized()
    # The `load` of 2.2 wants a group even with no_dist; the older function, beside it, does not.
    if hasattr(dcp, "load") and not (alone and golden.RELEASE < (2, 3)):
        dcp.load(state, storage_reader=reader, planner=planner)
    else:
        dcp.load_state_dict(state, reader, planner=planner, no_dist=alone)
    if not flatten:
        # Nested objects reach the planner, but not the caller.
        return {key: planner.state_dict[key] for key in state}
    if golden.RELEASE < (2, 4):
        # Top-level values that are no containers stay in the planner's own copy.
        return {key: planner.original_state_dict[key] for key in _keys(planner, state)}
    return state


def _keys(planner: Any, state: Any) -> list[Any]:
    more = [key for key in planner.original_state_dict if key not in state]
    return [*state, *more]


def settle(blank: Any, loaded: Any) -> tuple[Any, int]:
    """Stock torch puts objects under integer keys beside the key ("0" next to 0): move them back.

    Args:
        blank: the template, as it was before the load.
        loaded: the state after it.

    Returns:
        The state, and how many containers had to be mended.
    """
    if isinstance(blank, dict) and isinstance(loaded, dict):
        result: Any = {}
        moved = 0
        texts = {str(key) for key in blank if not isinstance(key, str)} - set(blank)
        for key, value in loaded.items():
            if key in texts:
                continue
            mended = not isinstance(key, str) and str(key) in texts and str(key) in loaded
            whole = _merge(value, loaded[str(key)]) if mended else value
            result[key], more = settle(blank.get(key), whole)
            moved += more + mended
        return result, moved
    if isinstance(blank, list) and isinstance(loaded, list) and len(blank) == len(loaded):
        pairs = [settle(a, b) for a, b in zip(blank, loaded, strict=True)]
        return [value for value, _ in pairs], sum(moved for _, moved in pairs)
    return loaded, 0


def _merge(at_key: Any, beside: Any) -> Any:
    """What the key holds, its sentinels replaced by what has come to lie beside it."""
    if isinstance(at_key, str) and at_key == SENTINEL:
        return beside
    if isinstance(at_key, dict) and isinstance(beside, dict):
        texts = {str(key): key for key in at_key}
        merged = dict(at_key)
        for key, value in beside.items():
            own = texts.get(str(key), key)
            merged[own] = _merge(at_key.get(own, SENTINEL), value)
        return merged
    if isinstance(at_key, list) and isinstance(beside, list):
        pairs = itertools.zip_longest(at_key, beside[: len(at_key)])
        return [_merge(a, b) for a, b in pairs]
    return at_key


# --------------------------------------------------------------------------------------------------
# Tensors that spread over ranks


def spreader(kind: str, ranks: int) -> Spread:
    """Spread whole tensors as `kind` says: "dtensor" or "sharded_tensor"."""
    # What gloo can send.
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
    """What this rank holds of a spread tensor."""
    if hasattr(value, "local_shards"):
        return [shard.tensor for shard in value.local_shards()]
    return [value.to_local()]


def is_spread(value: Any) -> bool:
    return hasattr(value, "local_shards") or hasattr(value, "to_local")


def gather(made: Template, state: Any) -> Any:
    """Put a description in the place of each spread tensor: whole, if no rank's part is wrong."""
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


@dataclass(frozen=True)
class Described:
    """A node that is known already."""

    node: Node


def _replace(state: Any, nodes: dict[int, Node]) -> Any:
    if id(state) in nodes:
        return Described(nodes[id(state)])
    if type(state) in (dict, OrderedDict):
        return type(state)((key, _replace(value, nodes)) for key, value in state.items())
    return [_replace(value, nodes) for value in state] if type(state) is list else state


def describe(state: Any) -> Node:
    """Like the golden checkpoints' own description, which knows no `Described`."""
    if isinstance(state, Described):
        return state.node
    if isinstance(state, dict):
        pairs = [[golden.describe(key), describe(value)] for key, value in state.items()]
        return {"kind": "dict", "type": type(state).__name__, "items": pairs}
    if type(state) is list:
        return {"kind": "list", "items": [describe(value) for value in state]}
    return golden.describe(state)


# --------------------------------------------------------------------------------------------------
# Cases

Loader = Callable[[Any, pathlib.Path, bool], Any]


def read_case(
    folder: pathlib.Path,
    spread: Spread | None = None,
    load: Loader = stock_load,
    judges: Sequence[Judge] = (known, storable),
) -> Node:
    """Load one case; the answer has `state` (what came back), `why` it did not, or `absent`.

    What only has a name in this release is tried as well, and left out if it fails.
    """
    content: Node = {}
    for judge in judges:
        content = _read_case(folder, judge, spread, load)
        if "why" not in content:
            break
    return content


def _read_case(folder: pathlib.Path, judge: Judge, spread: Spread | None, load: Loader) -> Node:
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    flatten = not folder.name.startswith(UNFLATTENED)
    try:
        reason = unreadable(expected, judge) if flatten else None
        if reason:
            return {"absent": reason}
        made = template(expected, judge, spread)
        blank = template(made.expected, judge).state
        loaded = load(made.state, folder / "ckpt", flatten)
        if spread is not None:
            loaded = gather(made, loaded)
        state, moved = settle(blank, loaded)
        return {
            "state": describe(state),
            "expected": made.expected,
            "left_out": made.left_out,
            "spread": len(made.truths),
            "beside": moved,
        }
    except BaseException as error:  # the checkpoint package's own error is no Exception
        return _failed(error, expected)


def _failed(error: BaseException, expected: Node) -> Node:
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        raise error
    if isinstance(error, golden.NotInThisReleaseError):
        return {"absent": golden.reason(error)}
    traceback.print_exception(type(error), error, error.__traceback__)
    return {"why": golden.reason(error), "expected": expected}


def unreadable(expected: Node, judge: Judge) -> str | None:
    """Why no checkpoint can give this release some tensor, by that tensor's dtype.

    A dtype that is unknown stands in the checkpoint's one metadata pickle, which then opens nowhere
    in this release; inside an object, it spoils that object only.
    """
    if expected["kind"] in ("dict", "list"):
        items = expected["items"]
        inner = [value for _, value in items] if expected["kind"] == "dict" else items
        return next(filter(None, (unreadable(value, judge) for value in inner)), None)
    if expected["kind"] != "tensor" or "quantizer" in expected:
        return None
    return judge(expected["dtype"]) or cannot_copy(expected["dtype"])


def cannot_copy(name: str) -> str | None:
    """Loading copies tensors. Some dtypes are only names: nothing is implemented for them."""
    dtype = getattr(torch, name)
    try:
        torch.empty(2, dtype=dtype).copy_(torch.empty(2, dtype=dtype))
    except (NotImplementedError, RuntimeError):
        return f"torch.{name} cannot be copied"
    return None


def read_through_torch_save(folder: pathlib.Path) -> Node:
    """Convert to a torch.save file, as this release does it, and load that."""
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    try:
        convert = golden.first_of("torch.distributed.checkpoint.format_utils:dcp_to_torch_save")
        with tempfile.TemporaryDirectory() as scratch:
            file = pathlib.Path(scratch) / "whole.pt"
            convert(str(folder / "ckpt"), str(file))
            state = torch.load(file, weights_only=False)
            return {"state": describe(state), "expected": expected}
    except BaseException as error:
        # The converter takes all or nothing.
        reason = unreadable(expected, storable) or lacks(expected, storable)
        return {"absent": reason} if reason else _failed(error, expected)


def join() -> tuple[int, int]:
    """This process's rank and the number of ranks; with several, the group is there afterwards."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group(
            "gloo", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=60)
        )
    return rank, ranks


def leave() -> None:
    """Taking a process group down hangs in some releases."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def answer(out: pathlib.Path, name: str, content: Node) -> None:
    """Write one answer, whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("checkpoints", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--cases", nargs="+", default=[])
    return parser


def cases(checkpoints: pathlib.Path, names: Sequence[str]) -> list[pathlib.Path]:
    found = sorted(path.parent for path in checkpoints.glob("*/expected.json"))
    return [path for path in found if not names or path.name in names]


def main() -> None:
    parser = arguments((__doc__ or "").partition("\n")[0])
    parser.add_argument("--torch-save", action="store_true", help="also through torch.save files")
    parser.add_argument("--spread", nargs="+", default=["dtensor", "sharded_tensor"])
    chosen = parser.parse_args()
    rank, ranks = join()
    kinds = chosen.spread if ranks > 1 else [None]
    if golden.RELEASE < (2, 1) and "dtensor" in kinds:
        kinds.remove("dtensor")
    for folder in cases(chosen.checkpoints.resolve(), chosen.cases):
        for kind in kinds:
            content = read_case(folder, kind and spreader(kind, ranks))
            if rank == 0:
                answer(chosen.out / (kind or "load"), folder.name, content)
        if chosen.torch_save:
            answer(chosen.out / "torch_save", folder.name, read_through_torch_save(folder))
    leave()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
