"""Files of `shardkeep.dcp` compared with those of stock torch, on one rank and on several."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import shardkeep.dcp as dcp
from support.scenarios import equal, same, values

ZSTD = "zstd"
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "2 threads": {"thread_count": 2},
    "3 threads": {"thread_count": 3},
    "4 threads": {"thread_count": 4},
    "file per item": {"single_file_per_rank": False},
    "file per item, 3 threads": {"single_file_per_rank": False, "thread_count": 3},
    "zstd": {"_extensions": ZSTD},
    "zstd, file per item": {"_extensions": ZSTD, "single_file_per_rank": False},
    "safetensors": {"serialization_format": SerializationFormat.SAFETENSORS},
    "safetensors, 2 threads": {
        "serialization_format": SerializationFormat.SAFETENSORS,
        "thread_count": 2,
    },
    "without collectives": {"use_collectives": False},
}


class OwnSavePlanner(dcp.DefaultSavePlanner):
    """A planner of a user's own class, so that a save calls every step of torch."""

    def create_local_plan(self) -> Any:
        return super().create_local_plan()


class OwnLoadPlanner(dcp.DefaultLoadPlanner):
    """A planner of a user's own class, so that a load calls every step of torch."""

    def create_local_plan(self) -> Any:
        return super().create_local_plan()


def writer_options(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return options of a writer, and options of `save`."""
    options = dict(OPTIONS[name])
    more = {k: options.pop(k) for k in ("use_collectives",) if k in options}
    if options.get("_extensions") == ZSTD:
        from torch.distributed.checkpoint._extension import ZStandard

        options["_extensions"] = [ZStandard()]
    return options, more


def save(module: Any, state: dict, path: Any, name: str, planner: Any = None) -> Any:
    options, more = writer_options(name)
    writer = module.FileSystemWriter(path, **options)
    return module.save(state, storage_writer=writer, planner=planner, **more)


def kind(file: Path) -> tuple[str, str]:
    """Return a file's suffix, and the format that its first bytes show."""
    data = file.read_bytes()[:9]
    if not data:
        return file.suffix, "empty"
    if file.name.endswith(".metadata"):
        return file.name, "pickle" if data[:1] == b"\x80" else "?"
    known = {b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd"}
    return file.suffix, known.get(data[:4], "safetensors" if data[8:9] == b"{" else "?")


def kinds(folder: Path) -> Counter:
    """Count the files of a checkpoint by kind, without the manifest, which stock torch lacks."""
    return Counter(kind(f) for f in folder.iterdir() if not f.name.startswith(".manifest-"))


def shards(rank: int, size: int) -> dict[str, Any]:
    """Return a state that is sharded over several ranks."""
    mesh = init_device_mesh("cpu", (size,))
    return {
        "model": {
            "w": distribute_tensor(values("w", (9, 3), torch.float32), mesh, [Shard(0)]),
            "v": distribute_tensor(values("v", (4, 6), torch.bfloat16), mesh, [Shard(1)]),
            "same": values("same", (5,), torch.int64),
            "scalar": torch.tensor(2.5, dtype=torch.float64),
        },
        "step": 7,
        f"of {rank}": {"rank": rank, "t": torch.full((2,), rank)},
    }


def plain(rank: int) -> dict[str, Any]:
    """Return a state with the same names and other values on each rank."""
    return {
        "weight": values(f"w{rank}", (4, 3), torch.float32),
        "rng": values(f"rng{rank}", (16,), torch.uint8),
        "note": f"rank {rank}",
        "deep": {"list": [rank, {"x": torch.tensor(float(rank))}]},
    }


def blank(state: Any) -> Any:
    """Return the same structure with other values."""
    if isinstance(state, dict):
        return {key: blank(value) for key, value in state.items()}
    if isinstance(state, list):
        return [blank(value) for value in state]
    return torch.zeros_like(state) if isinstance(state, torch.Tensor) else None


def whole(state: Any) -> Any:
    """Return the state with every DTensor gathered; called on all ranks."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return state.full_tensor() if hasattr(state, "full_tensor") else state


def same_files(rank: int, size: int, path: str, names: list[str]) -> str:
    """Save with stock torch, the engine, and in steps; load each checkpoint with every reader."""
    for name in names:
        safetensors = "serialization_format" in OPTIONS[name]
        per_rank = "use_collectives" in OPTIONS[name]
        state = plain(rank) if per_rank else shards(rank, size)
        if safetensors:
            state = {"model": state["model"]}
        expected = whole(state)
        ways = {"stock": (stock, None), "ours": (dcp, None), "steps": (dcp, OwnSavePlanner())}
        found = {}
        for way, (module, planner) in ways.items():
            folder = Path(path) / name / way
            save(module, state, folder, name, planner)
            dist.barrier()
            found[way] = kinds(folder)
        for way in ("ours", "steps"):
            # How items are distributed over files is free, and so is the number of empty files.
            counts = [Counter({s: 0 for s, _ in found[w]}) for w in ("stock", way)]
            for count, one in zip(counts, ("stock", way), strict=True):
                for (suffix, _), number in found[one].items():
                    count[suffix] += number
            assert counts[0] == counts[1], (name, found)
            filled = [{k for k in found[w] if k[1] != "empty"} for w in ("stock", way)]
            assert filled[0] == filled[1], (name, found)
        readers = [(stock, None), (dcp, None), (dcp, OwnLoadPlanner())]
        for way in ways:
            if safetensors and way == "stock":
                continue  # Stock torch can't load these either.
            for reader, planner in readers[1 if safetensors else 0 :]:
                loaded = blank(state)
                reader.load(loaded, checkpoint_id=Path(path) / name / way, planner=planner)
                assert equal(whole(loaded), expected), (name, way, reader, loaded)
        dist.barrier()
    return "fine"


def each_its_own(rank: int, size: int, path: str) -> str:
    """Save by each rank alone, and load on other numbers of ranks."""
    save(dcp, plain(rank), path, "without collectives")
    dist.barrier()
    if rank == 0:
        loaded = blank(plain(0))
        dcp.load(loaded, checkpoint_id=path, no_dist=True)
        assert equal(loaded, plain(0))
    group = dist.new_group([2, 3])
    if rank >= 2:
        loaded = blank(plain(0))
        dcp.load(loaded, checkpoint_id=path, process_group=group)
        assert equal(loaded, plain(0)), "another number of ranks: all have the same"
    dist.barrier()
    dcp.save({"new": torch.ones(1)}, checkpoint_id=path)
    dist.barrier()
    assert not [file.name for file in Path(path).glob("__*.metadata")]
    dist.barrier()
    save(dcp, plain(rank), path, "without collectives")
    dist.barrier()
    loaded = blank(plain(rank))
    dcp.load(loaded, checkpoint_id=path)
    assert same(loaded["rng"], plain(rank)["rng"]), "an earlier save must not hide this one"
    return "fine"
