"""Write the golden checkpoints with the torch that runs this script.

    python make.py OUT --seed 1

Every case becomes a folder `OUT/<case>` with `ckpt`, what torch wrote, and `expected.json`, what
was saved. `OUT/manifest.json` records for each case whether this release could write it and, if
not, why.

The script needs only the standard library, numpy and any torch from 2.0 on, because it runs in
environments where nothing of Shardkeep can be installed. Values follow from the seed by arithmetic,
not from torch's generator, so that every release saves the same numbers.

Importing torch takes seconds, so one process (and four for the cases with several ranks) serves all
cases. If a case fails in a way that may leave ranks out of step, or exceeds its time, its processes
are ended, and the next case gets new ones.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import datetime
import decimal
import enum
import fractions
import functools
import http
import importlib
import inspect
import json
import os
import pathlib
import platform
import queue
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import uuid
import zlib
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

State = dict[str, Any]

CHECKPOINT = "ckpt"
"""The path of each checkpoint, relative because newer releases store it in `.metadata`."""

RANKS = 4
SECONDS_PER_CASE = 120
RELEASE = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


class NotInThisReleaseError(Exception):
    """A case needs a feature that the running torch does not have."""


# --------------------------------------------------------------------------------------------------
# What is saved: numbers that follow from the seed, and objects of all kinds


@dataclass(frozen=True)
class Run:
    """The identity of a case and a rank, and a source of numbers."""

    case: str
    seed: int
    rank: int
    notes: dict[str, str]

    def steps(self, name: str, count: int) -> np.ndarray:
        """Return `count` integers from 0 to 250; the first depends on seed, case and name."""
        start = zlib.crc32(f"{self.seed}/{self.case}/{name}".encode())
        return (start % 251 + 92 * np.arange(count, dtype=np.int64)) % 251

    def tensor(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return a tensor of any dtype whose values are exact in that dtype."""
        count = int(np.prod(shape, dtype=np.int64))
        if dtype.is_complex:
            parts = self.steps(name, 2 * count).reshape(count, 2) / 16 - 7.8125
            whole = torch.from_numpy(parts.astype(np.float32)).view(count, 2)
            return torch.view_as_complex(whole).to(dtype).reshape(shape)
        steps = self.steps(name, count)
        if dtype.is_floating_point:
            return torch.from_numpy((steps - 125) / 16).to(dtype).reshape(shape)
        if dtype == torch.bool:
            return torch.from_numpy(steps % 2 == 0).reshape(shape)
        if dtype == torch.uint8:
            return torch.from_numpy(steps.astype(np.uint8)).reshape(shape)
        unsigned = {"uint16": "int16", "uint32": "int32", "uint64": "int64"}
        if short_name(dtype) in unsigned:
            signed = getattr(torch, unsigned[short_name(dtype)])
            return torch.from_numpy(3 * steps - 376).to(signed).view(dtype).reshape(shape)
        return torch.from_numpy(3 * steps - 376).to(dtype).reshape(shape)

    def raw(self, name: str, *shape: int) -> torch.Tensor:
        """Return bytes that use every bit, to be viewed as a dtype without arithmetic."""
        count = int(np.prod(shape, dtype=np.int64))
        return torch.from_numpy(self.steps(name, count).astype(np.uint8)).reshape(shape)


@dataclass
class RunSettings:
    """A user's own class, which no reader can import and every reader must handle."""

    name: str
    rate: float
    tags: list[str]


class Phase(enum.Enum):
    """A user's own enumeration."""

    WARMUP = 1
    TRAIN = 2


Point = namedtuple("Point", ["x", "y"])


def nested_state(run: Run) -> State:
    """Return a model, its optimizer and every kind of plain value, as in a training script."""
    return {
        "model": {
            "layers": {
                "0": {"weight": run.tensor("w0", 4, 6), "bias": run.tensor("b0", 4)},
                "1": {"weight": run.tensor("w1", 6, 4), "bias": run.tensor("b1", 6)},
            }
        },
        "optim": {
            "state": {
                i: {
                    "step": torch.tensor(3.0),
                    "exp_avg": run.tensor(f"m{i}", *shape),
                    "exp_avg_sq": run.tensor(f"v{i}", *shape),
                }
                for i, shape in enumerate([(4, 6), (4,)])
            },
            "param_groups": [
                {
                    "lr": 0.1,
                    "betas": (0.9, 0.999),
                    "eps": 1e-08,
                    "amsgrad": False,
                    "params": [0, 1],
                }
            ],
        },
        "list": [0, 1, run.tensor("in_list", 2), {"x": run.tensor("in_dict", 3), "y": "why"}],
        "plain_list": [0, 1, 2, 3, 4, 5],
        "dict": {
            "dict_a": {"dict_a_1": 1, "dict_a_2": 2},
            "dict_b": {"dict_b_1": 1, "dict_b_2": 2},
        },
        "tuple": (1, "two", 3.0),
        "scalars": {
            "i": 1,
            "big": 2**70,
            "f": 2.5,
            "s": "text ✓",
            "none": None,
            "yes": True,
            "raw": b"\x00\xffraw",
        },
        "ordered": OrderedDict([("b", 2), ("a", 1)]),
        "empty": {"dict": {}, "list": []},
        "rng": torch.arange(64, dtype=torch.uint8),
    }


def small_state(run: Run) -> State:
    """Return two tensors and a number, for cases that test a writer and not a state."""
    return {"a": run.tensor("a", 4, 4), "n": {"i": 1, "w": run.tensor("w", 5)}}


def many_tensors(run: Run, count: int = 12) -> State:
    """Return enough items of growing size that writer threads get different shares."""
    return {f"t{i:02}": run.tensor(f"t{i}", i + 1, 3) for i in range(count)} | {"n": 5}


def deep(depth: int, leaf: Any, wrap: Callable[[Any], Any]) -> Any:
    """Return `leaf` inside `depth` containers."""
    for _ in range(depth):
        leaf = wrap(leaf)
    return leaf


def objects_state(run: Run) -> State:
    """Return objects that users save with their tensors."""
    array = run.steps("array", 6)
    return {
        "numpy": {
            "float32": (array.reshape(2, 3) / 16).astype(np.float32),
            "int64": array,
            "fortran": np.asfortranarray(array.reshape(2, 3) * 1.5),
            "big_endian": array.astype(">i4"),
            "bool": array % 2 == 0,
            "text": np.array(["a", "bcd", "✓"]),
            "complex": array[:3] + 1j * array[3:],
            "empty": np.zeros((0, 3), np.float16),
            "zero_dim": np.array(int(array[0])),
            "scalar_float64": np.float64(array[0] / 16),
            "scalar_float32": np.float32(array[1] / 16),
            "scalar_int64": np.int64(array[2]),
            "scalar_bool": np.bool_(True),
            "datetime64": np.array(["2024-02-29"], dtype="datetime64[D]"),
        },
        "rng": {
            "python": random.Random(run.seed).getstate(),
            "numpy": np.random.RandomState(run.seed).get_state(),
        },
        "torch": {
            "size": torch.Size([2, 3]),
            "dtype": torch.bfloat16,
            "device": torch.device("cpu"),
            "cuda_device": torch.device("cuda", 1),
            "layout": torch.strided,
        },
        "time": {
            "datetime": datetime.datetime(2024, 2, 29, 12, 34, 56, 789, datetime.timezone.utc),
            "naive": datetime.datetime(2024, 2, 29),
            "date": datetime.date(2024, 2, 29),
            "delta": datetime.timedelta(days=1, seconds=2, microseconds=3),
        },
        "sets": {"set": {1, 2, 3}, "frozenset": frozenset({"a", "b"}), "empty": set()},
        "numbers": {
            "complex": complex(1.5, -0.0),
            "decimal": decimal.Decimal("1.10"),
            "fraction": fractions.Fraction(1, 3),
            "nan": float("nan"),
            "inf": float("inf"),
            "minus_inf": float("-inf"),
            "minus_zero": -0.0,
            "smallest": 5e-324,
            "largest": 1.7976931348623157e308,
            "huge": 2**2100,
            "minus_huge": -(2**70),
            "byte": 255,
            "short": 65535,
            "minus_one": -1,
            "int32_edge": 2**31,
            "int64_edge": 2**63,
        },
        "text": {"empty": "", "line": "a\nb", "nul": "a\0b", "emoji": "🗝", "long": "x" * 300},
        "binary": {"bytes": b"\x00\xff", "empty": b"", "bytearray": bytearray(b"ab\x80")},
        "path": pathlib.Path("run/step_1"),
        "pure_path": pathlib.PurePosixPath("/data/a"),
        "uuid": uuid.UUID(int=run.seed),
        "stdlib_enum": http.HTTPStatus.OK,
        "own_enum": Phase.TRAIN,
        "own_class": RunSettings("tiny", 0.1, ["a", "b"]),
        "own_class_in_list": [RunSettings("second", 0.2, [])],
        "named_tuple": Point(1, 2.5),
        "ordered": OrderedDict([("b", 2), ("a", 1)]),
        "default": defaultdict(int, {"k": 3}),
        "counter": Counter({"a": 2, "b": 1}),
        "slice": slice(1, None, 2),
        "range": range(0, 10, 3),
        "builtin": len,
        "type": int,
        "ellipsis": ...,
        "deep_list": deep(50, run.seed, lambda inner: [inner]),
        "deep_dict": deep(50, run.seed, lambda inner: {"k": inner}),
        "deep_tuple": deep(50, run.seed, lambda inner: (inner,)),
        "tuple_of_tensors": (run.tensor("in_tuple", 2, 3), run.tensor("in_tuple_too", 4), "text"),
        "dict_in_tuple": ({"w": run.tensor("in_dict_in_tuple", 3), "i": 1}, 2),
        "same_tensor_twice": (shared := run.tensor("twice", 3), shared),
        "same_list_twice": ([1, 2],) * 2,
    }


# --------------------------------------------------------------------------------------------------
# expected.json


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return the elements in row-major order, from memory: numpy lacks some dtypes."""
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    if not tensor.is_contiguous():
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    size = tensor.numel() * tensor.element_size()
    return ctypes.string_at(tensor.data_ptr(), size) if size else b""


def describe_quantizer(tensor: torch.Tensor) -> dict[str, Any]:
    """Return the parameters that turn the integers of a quantized tensor into numbers."""
    scheme = tensor.qscheme()
    name = str(scheme).removeprefix("torch.")
    if scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return {"scheme": name, "scale": tensor.q_scale(), "zero_point": tensor.q_zero_point()}
    return {
        "scheme": name,
        "scales": describe(tensor.q_per_channel_scales()),
        "zero_points": describe(tensor.q_per_channel_zero_points()),
        "axis": tensor.q_per_channel_axis(),
    }


def describe_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    described: dict[str, Any] = {
        "kind": "tensor",
        "dtype": short_name(tensor.dtype),
        "shape": list(tensor.shape),
    }
    if tensor.is_quantized:
        described["quantizer"] = describe_quantizer(tensor)
    return {**described, "data": base64_of(bytes_of(tensor))}


def describe_array(value: np.ndarray | np.generic) -> dict[str, Any]:
    kind = "ndarray" if isinstance(value, np.ndarray) else "numpy_scalar"
    return {
        "kind": kind,
        "dtype": value.dtype.str,
        "shape": list(value.shape),
        "data": base64_of(value.tobytes()),
    }


def describe_own(value: Any) -> dict[str, Any]:
    """Describe an object of a class of this script: readers show its name and its state."""
    state = value.value if isinstance(value, enum.Enum) else value
    state = tuple(state) if isinstance(state, tuple) else getattr(state, "__dict__", state)
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return {"kind": "opaque", "class": name, "state": describe(state)}


def describe(value: Any) -> dict[str, Any]:
    """Describe a value as JSON, exact to the bit, so that reading it needs no torch."""
    kind = type(value)
    if isinstance(value, torch.Tensor):
        return describe_tensor(value)
    if value is None or kind in (bool, int, float, str):
        return {"kind": "value", "type": kind.__name__, "value": value}
    if kind is bytes:
        return {"kind": "bytes", "data": base64_of(value)}
    if kind is bytearray:
        return {"kind": "bytes", "type": "bytearray", "data": base64_of(bytes(value))}
    if kind in (list, tuple):
        return {"kind": kind.__name__, "items": [describe(item) for item in value]}
    if kind is torch.Size:
        return {"kind": "size", "items": list(value)}
    if kind in (set, frozenset):
        items = [describe(item) for item in sorted(value)]
        return {"kind": "set", "type": kind.__name__, "items": items}
    if isinstance(value, dict):
        pairs = [[describe(key), describe(item)] for key, item in value.items()]
        return {"kind": "dict", "type": kind.__name__, "items": pairs}
    if isinstance(value, (np.ndarray, np.generic)):
        return describe_array(value)
    if kind.__module__ == __name__:
        return describe_own(value)
    return {"kind": "repr", "type": f"{kind.__module__}.{kind.__qualname__}", "value": repr(value)}


# --------------------------------------------------------------------------------------------------
# What differs between releases


def first_of(*places: str) -> Any:
    """Return the first of the dotted names "module:attribute" that this release has."""
    for place in places:
        module, _, attribute = place.partition(":")
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), attribute)
    raise NotInThisReleaseError(f"none of {', '.join(places)}")


def only_known(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the options, if this release's `function` accepts all of them."""
    known = inspect.signature(function).parameters
    missing = sorted(set(options) - set(known))
    if missing:
        raise NotInThisReleaseError(f"{function.__qualname__} has no {', '.join(missing)}")
    return options


def save(state: State, *, planner: Any = None, writer: Any = None, **options: Any) -> None:
    """Save with this release's own function, on every rank of the group or on this one alone."""
    writer = writer or file_writer()
    function = dcp.save if hasattr(dcp, "save") else dcp.save_state_dict
    if not dist.is_initialized() and "no_dist" in inspect.signature(function).parameters:
        options["no_dist"] = True
    options = {**only_known(function, options), "planner": planner}
    if hasattr(dcp, "save"):
        function(state, storage_writer=writer, **options)
    else:
        function(state, writer, **options)


def file_writer(**options: Any) -> Any:
    return dcp.FileSystemWriter(CHECKPOINT, **only_known(dcp.FileSystemWriter.__init__, options))


def dtensor_name(name: str) -> Any:
    """Return an object of the DTensor package, which was private before 2.5."""
    return first_of(f"torch.distributed.tensor:{name}", f"torch.distributed._tensor:{name}")


def cpu_mesh(ranks: Sequence[Any], names: tuple[str, ...] | None = None) -> Any:
    """Return a mesh of the ranks as they are nested in the list."""
    if names is not None:
        make = first_of("torch.distributed.device_mesh:init_device_mesh")
        return make("cpu", np.array(ranks).shape, mesh_dim_names=names)
    return dtensor_name("DeviceMesh")("cpu", ranks)


def placed(full: torch.Tensor, mesh: Any, *placements: Any) -> Any:
    """Return this rank's part of `full`: "r" is a replica, a number is the dimension to split."""
    if RELEASE < (2, 1):
        raise NotInThisReleaseError("the checkpoint package of 2.0 knows no DTensor")
    shard, replicate = dtensor_name("Shard"), dtensor_name("Replicate")
    chosen = [replicate() if place == "r" else shard(place) for place in placements]
    if full.dtype == torch.bfloat16 and RELEASE < (2, 3):  # gloo could not scatter it yet
        local = full.chunk(RANKS, placements[0])[dist.get_rank()].contiguous()
        return dtensor_name("DTensor").from_local(local, mesh, chosen, run_check=False)
    return dtensor_name("distribute_tensor")(full, mesh, chosen)


def whole(value: Any) -> Any:
    """Return the state with every DTensor gathered; called on all ranks in the same order."""
    if hasattr(value, "full_tensor"):
        return value.full_tensor()
    if isinstance(value, dict):
        return type(value)((key, whole(item)) for key, item in value.items())
    return [whole(item) for item in value] if type(value) is list else value


def sharded_tensor(full: torch.Tensor, dim: int, ranks: int = RANKS, group: Any = None) -> Any:
    """Return a ShardedTensor in chunks along `dim`, filled with this rank's part of `full`."""
    make = first_of("torch.distributed._shard.sharded_tensor:empty")
    specification = first_of("torch.distributed._shard.sharding_spec:ChunkShardingSpec")
    places = [f"rank:{rank}/cpu" for rank in range(ranks)]
    made = make(specification(dim=dim, placements=places), *full.shape, process_group=group)
    for shard in made.local_shards():
        start, size = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        box = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        shard.tensor.copy_(full[box])
    return made


def hugging_face_writer(**options: Any) -> Any:
    writer = first_of(
        "torch.distributed.checkpoint:HuggingFaceStorageWriter",
        "torch.distributed.checkpoint._hf_storage:_HuggingFaceStorageWriter",
    )
    return writer(path=CHECKPOINT, **only_known(writer.__init__, options))


def sharded_option() -> dict[str, bool]:
    """Return the option with which this release's HuggingFace writer writes every rank's shards."""
    writer = first_of("torch.distributed.checkpoint:HuggingFaceStorageWriter")
    known = inspect.signature(writer.__init__).parameters
    return {name: True for name in ("save_distributed", "save_sharded") if name in known}


# --------------------------------------------------------------------------------------------------
# The cases. Each saves to CHECKPOINT and returns the whole state for expected.json


@dataclass(frozen=True)
class Case:
    """One golden checkpoint: the function that writes it, and its number of ranks."""

    name: str
    ranks: int
    write: Callable[[Run], State]


CASES: dict[str, Case] = {}


def case(ranks: int = 1, name: str = "") -> Callable[[Callable[[Run], State]], Any]:
    """Register a function as a case under its own name."""

    def enter(write: Callable[[Run], State]) -> Callable[[Run], State]:
        chosen = name or write.__name__
        CASES[chosen] = Case(chosen, ranks, write)
        return write

    return enter


@case()
def nested(run: Run) -> State:
    save(state := nested_state(run))
    return state


@case()
def dtypes(run: Run) -> State:
    names = (
        "float32 float64 float16 bfloat16 int8 uint8 int16 int32 int64 bool complex64 complex128 "
        "float8_e4m3fn float8_e5m2 uint16 uint32 uint64"
    ).split()
    state = {}
    for name in names:
        try:
            tensor = run.tensor(name, 3, 5, dtype=getattr(torch, name))
            torch.save(tensor, os.devnull)
            state[f"dtype.{name}"] = tensor
        except Exception as error:
            run.notes[name] = reason(error)
    save(state)
    return state


@case()
def shapes(run: Run) -> State:
    sizes = [(), (0,), (1,), (7,), (0, 7), (7, 0), (1, 1, 1, 2), (2, 3, 4), (5, 1, 3)]
    state = {
        "shape." + ("x".join(map(str, size)) or "scalar"): run.tensor(str(size), *size)
        for size in sizes
    }
    save(state)
    return state


@case()
def special_values(run: Run) -> State:
    """Save bit patterns that a conversion through another type would change."""
    words = [0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 0x00000001, 0x7F7FFFFF, 0xFF800000]
    bits32 = torch.tensor([word - 2**32 if word >> 31 else word for word in words]).int()
    bits16 = torch.tensor([0x7FC1, -0x7FFF, 0x0001, -0x8000, 0x7C01, run.seed]).short()
    state = {
        "float32": bits32.view(torch.float32),
        "bfloat16": bits16.view(torch.bfloat16),
        "float16": bits16.view(torch.float16),
        "int64": torch.tensor([2**63 - 1, -(2**63), -1, 0]),
        "bool": torch.tensor([True, False]),
    }
    save(state)
    return state


@case()
def views(run: Run) -> State:
    base = run.tensor("base", 12, 10)
    state = {
        "transposed": base.t(),
        "strided": base[::3, 1::2],
        "narrow": base.narrow(0, 4, 2),
        "shared_a": base,
        "shared_b": base.view(10, 12),
        "expanded": run.tensor("column", 3, 1).expand(3, 4),
        "channels_last": run.tensor("image", 2, 3, 4, 5).to(memory_format=torch.channels_last),
        "param": torch.nn.Parameter(run.tensor("param", 4, 4)),
        "offset_scalar": base[3, 5],
    }
    save(state)
    return state


@case()
def keys(run: Run) -> State:
    names = ["plain", "dotted.name", "slash/name", "space name", "üñïçødé", "..", "a..b"]
    names += ["-dash", "0", "tab\tname", "x" * 300]
    save(state := {name: run.tensor(name, 2, 2) for name in names})
    return state


@case()
def int_keys(run: Run) -> State:
    """Save integer keys: torch turns them into text, but expected.json keeps them."""
    state = {
        "layers": {0: run.tensor("0", 2, 2), 1: run.tensor("1", 3), 10: run.tensor("10", 1)},
        "mixed": {0: run.tensor("m0", 2), "a": run.tensor("ma", 2), -1: "minus", "1.5": 1.5},
        "plain": {0: "zero", 7: {8: 9}, 2**40: [1, 2]},
        "other": {True: run.tensor("true", 1), None: "none", 2.5: "float", (1, 2): "tuple"},
        "groups": [{0: run.tensor("g0", 2), 1: "one"}, {0: "only text"}],
    }
    save(state)
    return state


@case()
def objects(run: Run) -> State:
    save(state := objects_state(run))
    return state


@case()
def empty_state(run: Run) -> State:
    save({})
    return {}


@case()
def tied(run: Run) -> State:
    """Save one tensor under several names: torch writes its bytes once for each."""
    shared = torch.nn.Parameter(run.tensor("embedding", 6, 4))
    state = {
        "embedding.weight": shared,
        "head.weight": shared,
        "head.detached": shared.detach(),
        "head.rows": shared.detach()[2:4],
    }
    save(state)
    return state


@case()
def large_header(run: Run) -> State:
    state = {f"layers.{i}.weight": run.tensor(str(i), 2) for i in range(200)}
    save(state)
    return state


@case()
def optimizer(run: Run) -> State:
    torch.manual_seed(run.seed)
    nn = torch.nn
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 4))
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(optim, T_max=10)
    for _ in range(2):
        optim.zero_grad()
        model(torch.randn(5, 8)).square().sum().backward()
        optim.step()
    state = {
        "model": model.state_dict(),
        "optim": optim.state_dict(),
        "sched": sched.state_dict(),
        "step": 2,
    }
    save(state)
    return state


@case()
def file_per_item(run: Run) -> State:
    nest = {"d": 1, "e": run.tensor("e", 2, 2)}
    state = {"a": run.tensor("a", 4, 4), "b": run.tensor("b", 3), "c": nest}
    save(state, writer=file_writer(single_file_per_rank=False))
    return state


@case()
def file_per_item_threads(run: Run) -> State:
    save(state := many_tensors(run), writer=file_writer(single_file_per_rank=False, thread_count=3))
    return state


@case()
def threads(run: Run) -> State:
    save(state := many_tensors(run), writer=file_writer(thread_count=3))
    return state


@case()
def sync_files_off(run: Run) -> State:
    save(state := small_state(run), writer=file_writer(sync_files=False))
    return state


@case()
def no_flatten(run: Run) -> State:
    nest = {"w": run.tensor("w", 2, 2), "i": 3}
    state = {"top": run.tensor("top", 3, 3), "nest": nest}
    save(state, planner=dcp.DefaultSavePlanner(flatten_state_dict=False))
    return state


@case()
def no_flatten_nested(run: Run) -> State:
    """Save without flattening: each top-level value is one object, whatever it contains."""
    view = run.tensor("base", 4, 6)
    state = {
        "top": run.tensor("top", 2),
        "model": {"layers": [{"w": view.t(), "half": view[1:3]}, {"w": run.tensor("w", 3)}]},
        "list": [run.tensor("l", 2, dtype=torch.bfloat16), 1, "two", (run.tensor("t", 1), None)],
        "param": {"p": torch.nn.Parameter(run.tensor("p", 2, 2))},
        "keys": {0: run.tensor("k", 2, dtype=torch.int64), "a": "text"},
        "number": 5,
    }
    save(state, planner=dcp.DefaultSavePlanner(flatten_state_dict=False))
    return state


@case()
def derived_v2_3(run: Run) -> State:
    """Save with the naming of 2.3 and older, which newer releases keep behind a switch."""
    version: Any = importlib.import_module("torch.distributed.checkpoint._version")
    before, version._derived_version = version._derived_version, "2_3"
    try:
        save(state := nested_state(run))
    finally:
        version._derived_version = before
    return state


@case()
def legacy_tensor_properties(run: Run) -> State:
    """Save properties of the class that ShardedTensor introduced, as all releases before 2.3 do."""
    legacy = first_of("torch.distributed._shard.sharded_tensor.metadata:TensorProperties")
    helpers: Any = importlib.import_module("torch.distributed.checkpoint.planner_helpers")
    before, helpers.TensorProperties = helpers.TensorProperties, legacy
    try:
        save(state := {"a": run.tensor("a", 4, 4), "b": run.tensor("b", 3, dtype=torch.int64)})
    finally:
        helpers.TensorProperties = before
    return state


@case()
def fsspec(run: Run) -> State:
    writer = first_of("torch.distributed.checkpoint._fsspec_filesystem:FsspecWriter")
    state = {"a": run.tensor("a", 4, 4), "n": {"i": 1}}
    save(state, writer=writer(CHECKPOINT))
    return state


@case()
def zstd_extension(run: Run) -> State:
    zstandard = first_of("torch.distributed.checkpoint._extension:ZStandard")
    state = {
        "a": run.tensor("a", 64, 64),
        "n": {"i": 1},
        "w": run.tensor("w", 5, dtype=torch.bfloat16),
    }
    save(state, writer=file_writer(_extensions=[zstandard()]))
    return state


@case()
def hf_safetensors(run: Run) -> State:
    state = {
        "a": run.tensor("a", 6, 4),
        "b.weight": run.tensor("b", 5, dtype=torch.bfloat16),
        "c": run.tensor("c", 3, 3, dtype=torch.int64),
    }
    files = {"a": 1, "b.weight": 1, "c": 2}
    save(state, writer=hugging_face_writer(fqn_to_index_mapping=files))
    return state


@case()
def hf_safetensors_sharded(run: Run) -> State:
    state = {"a": run.tensor("a", 6, 4), "b.weight": run.tensor("b", 5, dtype=torch.bfloat16)}
    save(state, writer=hugging_face_writer(**sharded_option()))
    return state


def unusual_dtypes() -> dict[str, Callable[[Run], torch.Tensor]]:
    """Return functions that create a tensor of each dtype without arithmetic or plain elements."""

    def per_tensor(run: Run, name: str) -> torch.Tensor:
        return torch.quantize_per_tensor(run.tensor(name, 4, 5), 0.125, 3, getattr(torch, name))

    def per_channel(run: Run, name: str) -> torch.Tensor:
        zeros = torch.arange(4)
        # Four bits a value: the only quantized dtype whose zero points are floats.
        zeros = zeros.float() if name == "quint4x2" else zeros
        scales = torch.tensor([0.125, 0.25, 0.5, 1.0])
        numbers = run.tensor(name, 4, 6)
        return torch.quantize_per_channel(numbers, scales, zeros, 0, getattr(torch, name))

    def viewed(run: Run, name: str) -> torch.Tensor:
        if not hasattr(torch, name):
            raise NotInThisReleaseError(f"no torch.{name}")
        if name.endswith("complex32"):
            part = torch.bfloat16 if name == "bcomplex32" else torch.float16
            return run.tensor(name, 3, 10, dtype=part).view(getattr(torch, name))
        return run.raw(name, 3, 10).view(getattr(torch, name))

    names = (
        "float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 bits1x8 bits2x4 bits4x2 "
        "bits8 bits16 complex32 bcomplex32"
    ).split()
    names += [f"{sign}int{bits}" for sign in ("u", "") for bits in range(1, 8)]
    quantized = ("qint8", "quint8", "qint32")
    return {
        **{f"{name}_per_tensor": functools.partial(per_tensor, name=name) for name in quantized},
        **{
            f"{name}_per_channel": functools.partial(per_channel, name=name)
            for name in (*quantized, "quint4x2")
        },
        **{name: functools.partial(viewed, name=name) for name in names},
    }


def enter_dtype(name: str, make: Callable[[Run], torch.Tensor]) -> None:
    """Add a case for one dtype; in a shared case, its failure would fail the others."""

    def write(run: Run) -> State:
        save(state := {"t": make(run), "plain": run.tensor("plain", 2)})
        return state

    case(name=f"more_dtypes.{name}")(write)


for unusual in unusual_dtypes().items():
    enter_dtype(*unusual)


@case()
def dtypes_in_objects(run: Run) -> State:
    """Save tensors in a tuple, as parts of an object: torch saves more dtypes there."""
    kept = {}
    for name, make in unusual_dtypes().items():
        try:
            tensor = make(run)
            torch.save(tensor, os.devnull)
            kept[name] = (tensor,)
        except Exception as error:
            run.notes[name] = reason(error)
    save(kept)
    return kept


@case(RANKS)
def dtensor_even(run: Run) -> State:
    mesh = cpu_mesh(list(range(RANKS)))
    s0, s1 = run.tensor("s0", 16, 3), run.tensor("s1", 3, 16)
    bf16 = run.tensor("bf16", 4, 8, dtype=torch.bfloat16)
    save(
        {
            "s0": placed(s0, mesh, 0),
            "s1": placed(s1, mesh, 1),
            "bf16": placed(bf16, mesh, 0),
            "step": 11,
        }
    )
    return {"s0": s0, "s1": s1, "bf16": bf16, "step": 11}


@case(RANKS)
def dtensor_1d(run: Run) -> State:
    mesh = cpu_mesh(list(range(RANKS)))
    full: State = {
        "s0": run.tensor("s0", 16, 3),
        "s1": run.tensor("s1", 3, 16),
        "uneven": run.tensor("uneven", 7, 4),
        "tiny": run.tensor("tiny", 2, 4),
        "rep": run.tensor("rep", 5, 5),
        "s0_bf16": run.tensor("s0_bf16", 4, 8, dtype=torch.bfloat16),
        "nested": {"w": run.tensor("w", 8, 2), "lr": 0.5},
    }
    places: State = {"s0": 0, "s1": 1, "uneven": 0, "tiny": 0, "rep": "r", "s0_bf16": 0}
    parts = {name: placed(full[name], mesh, place) for name, place in places.items()}
    save(parts | {"nested": {"w": placed(full["nested"]["w"], mesh, 0), "lr": 0.5}})
    return full


@case(RANKS)
def dtensor_uneven(run: Run) -> State:
    """Save shards of unequal size, none empty: the part of dtensor_1d that 2.1 and 2.2 support."""
    mesh = cpu_mesh(list(range(RANKS)))
    full = {"rows": run.tensor("rows", 7, 4), "bias": run.tensor("bias", 5)}
    full["columns"] = run.tensor("columns", 3, 10)
    save({name: placed(full[name], mesh, int(name == "columns")) for name in full})
    return full


def on_square(run: Run, tensors: dict[str, tuple[tuple[int, ...], tuple[Any, Any]]]) -> State:
    """Save tensors of (shape, placements) on a 2 by 2 mesh."""
    mesh = cpu_mesh([[0, 1], [2, 3]])
    full = {name: run.tensor(name, *shape) for name, (shape, _) in tensors.items()}
    save({name: placed(full[name], mesh, *places) for name, (_, places) in tensors.items()})
    return full


@case(RANKS)
def dtensor_2d(run: Run) -> State:
    return on_square(
        run,
        {
            "ss": ((8, 8), (0, 1)),
            "sr": ((8, 3), (0, "r")),
            "rs": ((3, 8), ("r", 1)),
            "rr": ((2, 2), ("r", "r")),
            "s1s0": ((6, 10), (1, 0)),
            "s0s0": ((16, 2), (0, 0)),
            "odd": ((7, 5), (0, 1)),
        },
    )


@case(RANKS)
def uneven_2d(run: Run) -> State:
    """Save shards of unequal size, with ranks that have no part of a tensor."""
    return on_square(
        run,
        {
            "odd": ((5, 3), (0, 1)),
            "one_row": ((1, 3), (0, 1)),
            "one": ((1, 1), (0, 1)),
            "three_rows_twice": ((3, 2), (0, 0)),
            "one_row_twice": ((1, 2), (0, 0)),
            "columns": ((2, 1), ("r", 1)),
        },
    )


@case(RANKS)
def hsdp(run: Run) -> State:
    """Save replicas of shards, as FSDP2 makes them on a mesh of (replicate, shard)."""
    return on_square(
        run,
        {
            "weight": ((8, 6), ("r", 0)),
            "columns": ((3, 8), ("r", 1)),
            "uneven": ((5, 2), ("r", 0)),
            "bias": ((6,), ("r", 0)),
            "norm": ((4,), ("r", "r")),
        },
    )


@case(RANKS)
def fsdp2(run: Run) -> State:
    """Save FSDP2 and its optimizer. Gradients are set by hand, as gloo cannot run its backward."""
    fully_shard = first_of(
        "torch.distributed.fsdp:fully_shard", "torch.distributed._composable.fsdp:fully_shard"
    )
    get_state_dict = first_of("torch.distributed.checkpoint.state_dict:get_state_dict")
    model = torch.nn.Sequential(torch.nn.Linear(8, 13), torch.nn.ReLU(), torch.nn.Linear(13, 4))
    fill(run, model)
    fully_shard(model, mesh=cpu_mesh(list(range(RANKS)), ("dp",)))
    optim = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(2):
        for name, parameter in model.named_parameters():
            grad = run.tensor(f"{name}/grad{step}", *parameter.shape)
            parameter.grad = placed(grad, parameter.device_mesh, 0)
        optim.step()
    model_state, optim_state = get_state_dict(model, optim)
    state = {"model": model_state, "optim": optim_state}
    save(state)
    return {name: whole(part) for name, part in state.items()}


@case(RANKS)
def tp_fsdp2(run: Run) -> State:
    """Save tensor parallelism inside FSDP2: two mesh dimensions split rows, the inner one first."""
    fully_shard = first_of(
        "torch.distributed.fsdp:fully_shard", "torch.distributed._composable.fsdp:fully_shard"
    )
    parallel = importlib.import_module("torch.distributed.tensor.parallel")
    first_of(
        "torch.distributed.tensor.placement_types:_StridedShard",
        "torch.distributed._tensor.placement_types:_StridedShard",
    )
    mesh = cpu_mesh([[0, 1], [2, 3]], ("dp", "tp"))
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    fill(run, model)
    full = {name: value.clone() for name, value in model.state_dict().items()}
    plan = {"0": parallel.ColwiseParallel(), "2": parallel.RowwiseParallel()}
    parallel.parallelize_module(model, mesh["tp"], plan)
    fully_shard(model, mesh=mesh["dp"])
    save({"model": model.state_dict()})
    return {"model": full}


def fill(run: Run, model: torch.nn.Module) -> None:
    """Fill every parameter with numbers of the seed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(run.tensor(name, *parameter.shape))


@case(RANKS, name="sharded_tensor")
def sharded_tensors(run: Run) -> State:
    full: State = {
        "st0": run.tensor("st0", 12, 5),
        "st_uneven": run.tensor("st_uneven", 11, 2),
        "st1": run.tensor("st1", 5, 8),
    }
    plain = {"rep": run.tensor("rep", 3, 3), "step": 7}
    dims = {"st0": 0, "st_uneven": 0, "st1": 1}
    save({name: sharded_tensor(full[name], dim) for name, dim in dims.items()} | plain)
    return full | plain


@case(RANKS)
def per_rank_objects(run: Run) -> State:
    """Save values of single ranks; expected.json omits those that a release drops."""
    tensors = [run.tensor(f"t{rank}", rank + 1, 2) for rank in range(RANKS)]
    shared = {"common": run.tensor("common", 4, 4), "epoch": 3}
    mine = {"rank": run.rank, "t": tensors[run.rank]}
    save({f"rank_{run.rank}": mine, **shared})
    kept: State = {}
    for rank in range(RANKS):
        if rank == 0 or RELEASE >= (2, 4):
            kept[f"rank_{rank}"] = {"rank": rank, "t": tensors[rank]}
        elif RELEASE >= (2, 1):
            kept[f"rank_{rank}"] = {"t": tensors[rank]}
    return kept | shared


@case(RANKS)
def no_collectives(run: Run) -> State:
    """Save one `.metadata` per rank. Each rank has another "i", so expected.json omits it."""
    tensors = {f"t{rank}": run.tensor(f"t{rank}", 3, 3) for rank in range(RANKS)}
    mine = f"t{run.rank}"
    save({mine: tensors[mine], "i": run.rank}, use_collectives=False)
    return tensors


@case(RANKS)
def save_over(run: Run) -> State:
    """Save on four ranks, then on two to the same path: two stale files remain."""
    pair = dist.new_group([0, 1])
    first, second = run.tensor("first", 8, 2), run.tensor("second", 6, 2)
    save({"w": sharded_tensor(first, 0), "step": 1})
    dist.barrier()
    if run.rank < 2:
        options = {"process_group": pair}
        save({"w": sharded_tensor(second, 0, ranks=2, group=pair), "step": 2}, **options)
    dist.barrier()
    return {"w": second, "step": 2}


def hf_ranks(run: Run, **options: Any) -> State:
    """Save DTensors with the HuggingFace writer, the shards of each rank in separate files."""
    mesh = cpu_mesh(list(range(RANKS)))
    full = {
        "rows": run.tensor("rows", 8, 4),
        "columns": run.tensor("columns", 4, 8),
        "uneven.weight": run.tensor("uneven", 7, 3, dtype=torch.bfloat16),
        "plain": run.tensor("plain", 3),
    }
    places = {"rows": 0, "columns": 1, "uneven.weight": 0}
    parts = {name: placed(full[name], mesh, place) for name, place in places.items()}
    save(parts | {"plain": full["plain"]}, writer=hugging_face_writer(**options))
    return full


@case(RANKS)
def hf_multi_rank(run: Run) -> State:
    return hf_ranks(run, **sharded_option())


@case(RANKS)
def hf_multi_rank_consolidated(run: Run) -> State:
    return hf_ranks(run, **sharded_option(), enable_consolidation=True)


@case()
def async_save(run: Run) -> State:
    """Save asynchronously; this runs last, as other cases must not have its group of one."""
    begin = first_of(
        "torch.distributed.checkpoint:async_save",
        "torch.distributed.checkpoint.state_dict_saver:async_save",
        "torch.distributed.checkpoint.state_dict_saver:_async_save",
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state = {"a": run.tensor("a", 40, 4), "n": {"i": 1, "w": run.tensor("w", 5)}}
    begin(state, storage_writer=file_writer()).result()
    return state


# --------------------------------------------------------------------------------------------------
# A worker: one rank, which serves cases by name until its input ends


def reason(error: BaseException) -> str:
    """Return the root exception in one line, without paths of this machine."""
    failures = getattr(error, "failures", None)  # of the checkpoint package: rank -> (error, stack)
    if failures:
        return reason(next(iter(failures.values()))[0])
    text = re.sub(r"\s*\([^()]*/[^()]*\)", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:200]


def attempt(chosen: Case, out: pathlib.Path, seed: int, rank: int) -> dict[str, Any]:
    """Write one case; `in_step` in the result says whether the ranks can run another case."""
    folder = out / chosen.name
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    run = Run(chosen.name, seed, rank, {})
    try:
        state = chosen.write(run)
        if rank == 0:
            expected = json.dumps(describe(state))
            (folder / "expected.json").write_text(expected, encoding="utf-8")
    except BaseException as error:  # the checkpoint package's own error is no Exception
        missing = isinstance(error, (ImportError, AttributeError, NotInThisReleaseError))
        return {"ok": False, "why": reason(error), "in_step": missing or chosen.ranks == 1}
    answer: dict[str, Any] = {"ok": True, "in_step": True}
    return answer | ({"left_out": run.notes} if run.notes else {})


def serve(out: pathlib.Path, seed: int, rank: int, ranks: int) -> None:
    """Answer each line of the input, the name of a case, with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not end up between the answers
    if ranks > 1:
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
    for line in sys.stdin:
        answer = attempt(CASES[line.strip()], out, seed, rank)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # taking a process group down hangs in some releases


# --------------------------------------------------------------------------------------------------
# The conductor: it starts workers and asks them for one case after the other


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Crew:
    """The worker processes of one world size."""

    def __init__(self, out: pathlib.Path, seed: int, ranks: int) -> None:
        variables = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.answers: queue.Queue[tuple[int, str]] = queue.Queue()
        self.members = [
            subprocess.Popen(
                [sys.executable, __file__, out, f"--seed={seed}", f"--serve={rank}/{ranks}"],
                env={**os.environ, **variables},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        for rank, member in enumerate(self.members):
            threading.Thread(target=self._listen, args=(rank, member), daemon=True).start()

    def _listen(self, rank: int, member: subprocess.Popen[str]) -> None:
        assert member.stdout is not None
        for line in member.stdout:
            self.answers.put((rank, line))
        self.answers.put((rank, ""))

    def ask(self, name: str) -> dict[str, Any]:
        """Write a case on all ranks; return the first failure, if there is one."""
        for member in self.members:
            assert member.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                member.stdin.write(name + "\n")
                member.stdin.flush()
        outcome: dict[str, Any] = {"ok": True, "in_step": True}
        for _ in self.members:
            try:
                # Once one rank has failed, the others wait for it in vain: no need to do the same.
                patience = SECONDS_PER_CASE if outcome["ok"] else 5
                rank, line = self.answers.get(timeout=patience)
            except queue.Empty:
                why = outcome.get("why", f"not done after {SECONDS_PER_CASE} seconds")
                return {"ok": False, "why": why, "in_step": False}
            if not line:
                why = outcome.get("why", f"rank {rank} ended with code {self.members[rank].wait()}")
                return {"ok": False, "why": why, "in_step": False}
            answer = json.loads(line)
            if outcome["ok"]:
                outcome = {**answer, **outcome} if answer["ok"] else answer
            outcome["in_step"] = outcome["in_step"] and answer["in_step"]
        return outcome

    def leave(self) -> None:
        for member in self.members:
            member.kill()
            member.wait()


@contextlib.contextmanager
def crews(out: pathlib.Path, seed: int) -> Iterator[Callable[[Case], dict[str, Any]]]:
    """Yield a function that writes a case, and starts workers when they are first needed."""
    working: dict[int, Crew] = {}

    def perform(chosen: Case) -> dict[str, Any]:
        if chosen.ranks not in working:
            working[chosen.ranks] = Crew(out, seed, chosen.ranks)
        outcome = working[chosen.ranks].ask(chosen.name)
        if not outcome.pop("in_step"):
            working.pop(chosen.ranks).leave()
        return outcome

    try:
        yield perform
    finally:
        for crew in working.values():
            crew.leave()


def make(out: pathlib.Path, seed: int, names: Sequence[str]) -> None:
    """Write the cases and the manifest."""
    out.mkdir(parents=True, exist_ok=True)
    entries = {}
    with crews(out, seed) as perform:
        for name in names:
            chosen = CASES[name]
            outcome = perform(chosen)
            if not outcome["ok"]:
                shutil.rmtree(out / name, ignore_errors=True)
            entries[name] = {"ok": outcome.pop("ok"), "ranks": chosen.ranks, **outcome}
            print(name, entries[name], file=sys.stderr, flush=True)
    manifest = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "seed": seed,
        "cases": dict(sorted(entries.items())),
    }
    text = json.dumps(manifest, indent=1, sort_keys=True)
    (out / "manifest.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=pathlib.Path, help="folder for the cases; must not exist yet")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    out = chosen.out.resolve()
    if chosen.serve:
        rank, ranks = map(int, chosen.serve.split("/"))
        serve(out, chosen.seed, rank, ranks)
    elif out.exists():
        parser.error(f"{out} exists: a set is made afresh, so that no file of another stays in it")
    else:
        make(out, chosen.seed, chosen.cases)


if __name__ == "__main__":
    main()
