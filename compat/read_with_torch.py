"""Load checkpoints with the torch that runs this script, and describe the result.

    python read_with_torch.py CHECKPOINTS OUT [--torch-save] [--cases NAME ...]

Needs only numpy and any torch from 2.0 on, not shardkeep. `CHECKPOINTS/<case>/` holds `ckpt` and
`expected.json`; for each case, `OUT/<case>.json` describes what this release's own loader returned,
in the form of `expected.json`. The comparison is made elsewhere.

If it is started once on each rank (with RANK, WORLD_SIZE and MASTER_PORT set), tensors are loaded
into DTensors or ShardedTensors over the ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from spread import agree, describe, gather, spreader
from templates import (
    Judge,
    Node,
    Spread,
    golden,
    known,
    lacks,
    settle,
    storable,
    template,
    unreadable,
)

UNFLATTENED = "no_flatten"
"""Names of cases whose top-level values are one leaf each, and must be loaded as such."""


def stock_load(state: Any, path: pathlib.Path, flatten: bool) -> Any:
    """Fill a state; return the object into which this release has loaded it."""
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=flatten)
    reader = dcp.FileSystemReader(str(path))
    alone = not dist.is_initialized()
    # The `load` of 2.2 needs a group even with no_dist; the older function does not.
    if hasattr(dcp, "load") and not (alone and golden.RELEASE < (2, 3)):
        dcp.load(state, storage_reader=reader, planner=planner)
    else:
        dcp.load_state_dict(state, reader, planner=planner, no_dist=alone)
    if not flatten:
        # Nested objects are in the planner's state, but not in the caller's.
        return {key: planner.state_dict[key] for key in state}
    if golden.RELEASE < (2, 4):
        # Top-level values other than containers are only in the planner's own copy.
        return {key: planner.original_state_dict[key] for key in _keys(planner, state)}
    return state


def _keys(planner: Any, state: Any) -> list[Any]:
    more = [key for key in planner.original_state_dict if key not in state]
    return [*state, *more]


Loader = Callable[[Any, pathlib.Path, bool], Any]


def read_case(
    folder: pathlib.Path,
    spread: Spread | None = None,
    load: Loader = stock_load,
    judges: Sequence[Judge] = (known, storable),
) -> Node:
    """Load one case; return its `state`, or `why` it failed, or what is `absent` in the release.

    Tensors of dtypes that have only a name in this release are tried, and left out if they fail.
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
        node = describe(state)
        if spread is not None:
            agree(node)
        return {
            "state": node,
            "expected": made.expected,
            "left_out": made.left_out,
            "spread": len(made.truths),
            "beside": moved,
        }
    except BaseException as error:  # CheckpointException is a BaseException
        return _failed(error, expected)


def _failed(error: BaseException, expected: Node) -> Node:
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        raise error
    if isinstance(error, golden.NotInThisReleaseError):
        return {"absent": golden.reason(error)}
    traceback.print_exception(type(error), error, error.__traceback__)
    return {"why": golden.reason(error), "expected": expected}


def read_through_torch_save(folder: pathlib.Path) -> Node:
    """Convert to a torch.save file with this release's function, and load that file."""
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    try:
        convert = golden.first_of("torch.distributed.checkpoint.format_utils:dcp_to_torch_save")
        with tempfile.TemporaryDirectory() as scratch:
            file = pathlib.Path(scratch) / "whole.pt"
            convert(str(folder / "ckpt"), str(file))
            state = torch.load(file, weights_only=False)
            return {"state": describe(state), "expected": expected}
    except BaseException as error:
        # The converter can't leave out a tensor.
        reason = unreadable(expected, storable) or lacks(expected, storable)
        return {"absent": reason} if reason else _failed(error, expected)


def join() -> tuple[int, int]:
    """Return this rank and the number of ranks; with several, form the process group."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group(
            "gloo", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=60)
        )
    return rank, ranks


def leave() -> None:
    """Exit without ending the process group, which hangs in some releases."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def answer(out: pathlib.Path, name: str, content: Node) -> None:
    """Write one answer atomically."""
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
    parser.add_argument(
        "--torch-save", action="store_true", help="load through torch.save files as well"
    )
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
