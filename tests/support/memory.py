"""Measure the memory of a save or a load in a process of its own, in bytes; print it as JSON."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import shardkeep as sk
from shardkeep import Box
from shardkeep.dcp._consolidate_hf_safetensors import consolidate_safetensors_files
from shardkeep.format.safetensors.write import file_name, layout, of_parts
from shardkeep.types import DType

MIB = 1 << 20
BUDGET = 32 * MIB


def rss() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def peak(work: Callable[[], Any]) -> int:
    """Return the bytes of resident memory at the peak of `work`, beyond those before it.

    Memory freed by earlier work is first returned to the system: reusing it would not be counted.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Resets the peak to the present size.
    before = rss()
    work()
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 - before


def state(fill: float = 1.0) -> dict[str, Any]:
    """Return 320 MiB: large tensors, one that is not contiguous, and small ones."""
    made: dict[str, Any] = {f"l{n}": torch.full((4096, 2048), fill) for n in range(9)}
    made["t"] = torch.full((2048, 4096), fill).t()
    made["small"] = {str(n): torch.full((16,), fill) for n in range(200)}
    return made


def columns(fill: float) -> dict[str, Any]:
    """Return the left half of each tensor's columns; whole rows were saved."""
    half = torch.full((4096, 1024), fill)
    return {f"l{n}": sk.Shards((4096, 2048), [((0, 0), half), ((0, 1024), half)]) for n in range(9)}


def exported(folder: Path) -> int:
    """Return the peak of joining 6 tensors, each saved as halves in two files, 192 MiB in all."""
    for part in range(2):
        kind, begin = (DType.named("float32"), (2048, 2048)), (2048 * part, 0)
        names = [f"l{n}" for n in range(6)]
        laid_out = layout(dict.fromkeys(names, kind), of_parts(dict.fromkeys(names, begin)))
        (folder / "parts").mkdir(exist_ok=True)
        with (folder / "parts" / file_name(1, 1, part + 1)).open("wb") as file:
            file.write(laid_out.header)
            for n in range(6):
                file.write(np.full((2048, 2048), n + part / 2, np.float32).data)
    os.environ["SHARDKEEP_MAX_HOST_MEMORY_BYTES"] = str(BUDGET)
    join = consolidate_safetensors_files
    taken = peak(
        lambda: join(str(folder / "parts"), str(folder / "whole"), {f"l{n}": 1 for n in range(6)})
    )
    del os.environ["SHARDKEEP_MAX_HOST_MEMORY_BYTES"]
    whole = sk.open(folder / "whole")
    for n in range(6):
        assert (whole.read(f"l{n}")[::2048, 7] == [n, n + 0.5]).all()
    return taken


def main(path: str) -> dict[str, Any]:
    small = {"a": torch.ones(3), "n": 1}
    sk.save(small, f"{path}/warm")  # imports and caches of the first save and load
    sk.load(small, f"{path}/warm")
    sk.async_save(small, f"{path}/warm2").result()
    sk.release_memory()
    mine = state()
    found = {"save": peak(lambda: sk.save(mine, f"{path}/a", max_host_memory=BUDGET))}
    found["async"] = peak(lambda: sk.async_save(mine, f"{path}/b", max_host_memory=BUDGET).result())
    found["load"] = peak(lambda: sk.load(mine, f"{path}/a", max_host_memory=BUDGET))
    for verify in (True, False):
        template = columns(0.0)
        found[f"reshard {verify}"] = peak(
            lambda t=template, v=verify: sk.load(
                t, f"{path}/a", max_host_memory=BUDGET, verify=v, strict={"*": True}
            )
        )
    cast = {name: torch.zeros(4096, 2048, dtype=torch.float16) for name in mine if name[0] == "l"}
    found["load cast"] = peak(
        lambda: sk.load(cast, f"{path}/a", max_host_memory=BUDGET, dtype="cast")
    )
    light = {f"l{n}": torch.full((4096,), float(n)) for n in range(5000)}  # 16 KiB each
    found["save light"] = peak(lambda: sk.save(light, f"{path}/light", max_host_memory=BUDGET))
    found["export"] = exported(Path(path))
    ckpt = sk.open(f"{path}/a")
    found["slice"] = peak(lambda: ckpt.read("l1", Box((0, 5), (4096, 1)))) - 4096 * 4
    return found


def growth(path: str, saves: int) -> dict[str, Any]:
    """Return the resident memory after each of many saves, without the first ones."""
    mine = {str(n): torch.ones(1000) for n in range(300)} | {"big": torch.ones(MIB)}
    sizes = []
    for number in range(saves):
        if number % 2:
            sk.save(mine, f"{path}/c", overwrite=True)
        else:
            sk.async_save(mine, f"{path}/c", overwrite=True).result()
        sizes.append(rss())
    return {"sizes": sizes[20:]}


if __name__ == "__main__":
    kind, path = sys.argv[1:3]
    print(json.dumps(growth(path, 200) if kind == "growth" else main(path)))
