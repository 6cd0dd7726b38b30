"""Save states with Shardkeep, in the layout of the golden checkpoints.

    python states.py OUT --seed 7

Runs in any environment that has torch and shardkeep, started once per rank. The states are those of
`tests/golden/make.py`, saved by Shardkeep instead of torch, and some that only Shardkeep can save.
Every case becomes `OUT/<case>/` with `ckpt` and `expected.json`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

import read_with_torch
import torch
import torch.distributed as dist
from templates import golden, storable

import shardkeep as sk
from shardkeep.testing.simulated_ranks import run as run_simulated
from shardkeep.types import Box

Run = golden.Run
State = dict[str, Any]

STORAGE_ONLY = """dtypes file_per_item file_per_item_threads threads sync_files_off fsspec
zstd_extension async_save no_collectives derived_v2_3 legacy_tensor_properties hf_safetensors
hf_safetensors_sharded hf_multi_rank hf_multi_rank_consolidated""".split()
"""Golden cases that test one of torch's own writers, not a state."""

DTYPES = """float32 float64 float16 bfloat16 int8 uint8 int16 int32 int64 bool complex64 complex128
float8_e4m3fn float8_e5m2 uint16 uint32 uint64""".split()

CASES: dict[str, Any] = {name: c for name, c in golden.CASES.items() if name not in STORAGE_ONLY}


def save(state: Any, *, planner: Any = None, process_group: Any = None, **_: Any) -> None:
    """Save a state in the place of the golden script's own `save`."""
    ranks = None if process_group is None else dist.get_process_group_ranks(process_group)
    flatten = planner is None or planner.flatten_state_dict
    sk.save(state, golden.CHECKPOINT, overwrite=True, flatten=flatten, ranks=ranks)


def case(ranks: int = 1, name: str = "") -> Callable[[Callable[[Run], State]], Any]:
    """Register a function as a case under its name."""

    def enter(write: Callable[[Run], State]) -> Callable[[Run], State]:
        chosen = name or write.__name__
        CASES[chosen] = golden.Case(chosen, ranks, write)
        return write

    return enter


def enter_dtype(name: str) -> None:
    """Add a case for one dtype; in a shared one, an unknown dtype makes all metadata unreadable."""

    def write(run: Run) -> State:
        if not hasattr(torch, name):
            raise golden.NotInThisReleaseError(f"no torch.{name}")
        dtype = getattr(torch, name)
        state = {
            "matrix": run.tensor("matrix", 3, 5, dtype=dtype),
            "scalar": run.tensor("scalar", dtype=dtype),
            "nothing": torch.empty((0, 4), dtype=dtype),
        }
        if storable(name) is None:
            state["in_tuple"] = (run.tensor("in_tuple", 4, dtype=dtype), 1)
        save(state)
        return state

    case(name=f"dtype.{name}")(write)


for dtype_name in DTYPES:
    enter_dtype(dtype_name)


@case()
def top_values(run: Run) -> State:
    """Save plain values at the top level, which releases up to 2.3 do not return to the caller."""
    state = {
        "int": 12,
        "float": 0.1,
        "text": "naïve ✓",
        "bytes": b"\x00\xff",
        "none": None,
        "no": False,
        "tuple": (1, (2.5, "x"), None),
        "list": [1, "two", None, (3,)],
        "tensor": run.tensor("t", 3),
    }
    save(state)
    return state


@case()
def containers(run: Run) -> State:
    """Save containers without tensors, and empty containers, in every position."""
    state = {
        "w": run.tensor("w", 2, 3),
        "empty": {"dict": {}, "list": [], "tuple": ()},
        "beside": {"t": run.tensor("beside", 2), "nothing": {}, "no_list": [], "one": {"deep": {}}},
        "values_only": {"a": {"b": {"c": 1}}, "l": [{"x": 1}, {"y": [1, 2]}, []]},
        "param_groups": [{"lr": 0.1, "params": [0, 1], "betas": (0.9, 0.99)}, {"lr": 0.2}],
        "in_list": [{"w": run.tensor("in_list", 2), "groups": [{"k": 1}]}, {"only": "text"}, 3],
        "schedulers": {"0": {"last_epoch": 4, "base_lrs": [0.1, 0.2]}, "1": {}},
    }
    save(state)
    return state


@case()
def odd_names(run: Run) -> State:
    """Save names that would be invalid or dangerous as file names."""
    state = {
        "..": {"../../up": run.tensor("up", 2), "": run.tensor("empty", 1)},
        "a.b": {"c.d": run.tensor("dots", 2), "/": {"//x": 1}},
        "日本": {"ключ": [run.tensor("unicode", 2), "值"]},
        "a b\n": {"\t": run.tensor("space", 2)},
    }
    save(state)
    return state


@case()
def overwritten(run: Run) -> State:
    """Save over a checkpoint that had other names, other shapes and more of them."""
    save({"w": run.tensor("old", 9, 9), "gone": run.tensor("gone", 4), "step": 1})
    state = {"w": run.tensor("new", 4, 5), "step": 2, "added": {"x": run.tensor("x", 3)}}
    save(state)
    return state


@case()
def many(run: Run) -> State:
    """Save enough for several blocks and reads: a tensor above 1 MiB beside small ones."""
    large = run.tensor("large", 700, 517)
    state: State = {"large": large, "large_t": large.t(), "rows": large[100:300]}
    state |= {f"small.{i}": run.tensor(f"s{i}", i % 7, 3) for i in range(150)}
    save(state)
    return state


UNEVEN = {
    # name: shape, and the boxes of the four ranks (offsets, sizes), all of different shapes
    "uneven": ((7, 5), [((0, 0), (3, 4)), ((0, 4), (3, 1)), ((3, 0), (4, 2)), ((3, 2), (4, 3))]),
    "one_rank_empty": ((3, 4), [((0, 0), (1, 4)), None, ((1, 0), (2, 1)), ((1, 1), (2, 3))]),
    "replicas": ((4, 6), [((0, 0), (4, 2)), ((0, 2), (4, 4)), ((0, 0), (4, 2)), ((0, 2), (4, 4))]),
    "scattered": ((8,), [((1,), (2,)), ((3,), (1,)), ((0,), (1,)), ((4,), (4,))]),
}


def shards(full: torch.Tensor, place: Any) -> sk.Shards:
    """Return a rank's boxes of a whole tensor."""
    if place is None:
        return sk.Shards(full.shape, [], full.dtype)
    box = Box(*place)
    return sk.Shards(full.shape, [(box, full[box.slices].clone())])


def per_rank_state(run: Run, rank: int) -> tuple[State, State]:
    """Return the state that a rank saves, and the content of the checkpoint afterwards."""
    whole: State = {name: run.tensor(name, *shape) for name, (shape, _) in UNEVEN.items()}
    whole["half"] = run.tensor("half", 6, 4, dtype=torch.bfloat16)
    tied = run.tensor("tied", 5, 3)
    common = {
        "tied": {"embed": tied, "head": tied},
        "groups": [{"lr": 0.1, "params": [0, 1]}],
        "step": 7,
    }
    own = [
        {"rng": run.tensor(f"rng{r}", r + 1), "position": {"file": r, "at": 100 + r}}
        for r in range(golden.RANKS)
    ]
    mine = {name: shards(whole[name], places[rank]) for name, (_, places) in UNEVEN.items()}
    rows = [((0, 0), (1, 4)), ((1, 0), (2, 4)), None, ((3, 0), (3, 4))]
    mine["half"] = shards(whole["half"], rows[rank])
    passed = {"sharded": mine, **common, "ranks": {str(rank): own[rank]}}
    return passed, {
        "sharded": whole,
        **common,
        "ranks": {str(r): own[r] for r in range(golden.RANKS)},
    }


@case()
def simulated_ranks(run: Run) -> State:
    """Save on four simulated ranks: uneven boxes on two dimensions, replicas, values per rank."""
    run_simulated(
        golden.RANKS,
        lambda ranks: sk.save(
            per_rank_state(run, ranks.rank)[0], golden.CHECKPOINT, ranks=ranks, overwrite=True
        ),
    )
    return per_rank_state(run, 0)[1]


@case(golden.RANKS)
def shards_by_hand(run: Run) -> State:
    """Save the state of `simulated_ranks` on real ranks."""
    passed, whole = per_rank_state(run, run.rank)
    save(passed)
    return whole


def write(out: pathlib.Path, seed: int, names: list[str]) -> None:
    """Write all cases for this number of ranks, in the same order on every rank."""
    rank, ranks = read_with_torch.join()
    golden.save = save
    outcomes = {}
    for name, chosen in CASES.items():
        if chosen.ranks != ranks or (names and name not in names):
            continue
        outcome = golden.attempt(chosen, out, seed, rank)
        if not outcome["ok"]:
            print(f"rank {rank}: {name}: {outcome['why']}", file=sys.stderr)
            (out / name / "expected.json").unlink(missing_ok=True)
        outcomes[name] = outcome
        if ranks > 1:
            dist.barrier()
    if rank == 0:
        text = json.dumps(outcomes)
        (out / f"written_by_{ranks}.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--cases", nargs="+", default=[])
    chosen = parser.parse_args()
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    write(out, chosen.seed, chosen.cases)
    read_with_torch.leave()


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        raise
