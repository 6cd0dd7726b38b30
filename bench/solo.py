"""What one workload alone needs of a seat: each a function that runs in the rank's process."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import Sample, percentile, resident, timed

__all__ = ["loop", "memory_over", "slice_of"]

BLOCK = 256 * 1024
"""Bytes of a payload that one checksum covers."""


def slice_of(seat: Any, entry: str, state: str, path: Path, check: bool) -> Sample:
    """Read the second quarter of the columns of the state's one tensor."""
    (tensor,) = seat.states[state].values()
    height, width = tensor.shape
    first, last = width // 4, width // 2
    found: list[np.ndarray] = []
    contestant = seat.entries[entry]
    sample = timed(lambda: found.append(contestant.columns(tensor, first, last, path)))
    if check:
        expected = tensor[:, first:last].contiguous().numpy()
        same = np.array_equal(found[0].view(np.int32), expected.view(np.int32))
        if not same:
            raise AssertionError("the slice is not what was saved")
    size = tensor.element_size()
    row, run = width * size, (last - first) * size
    starts = np.arange(height, dtype=np.int64) * row + first * size
    blocks = np.unique(np.concatenate([starts // BLOCK, (starts + run - 1) // BLOCK]))
    figures = {
        "bytes_read": sample.read,
        "bytes_needed": height * run,
        "bytes_rounded": min(len(blocks) * BLOCK, height * row),
    }
    return Sample(sample.begin, sample.end, sample.cpu, sample.peak, sample.read, figures)


def memory_over(seat: Any, entry: str, state: str, verb: str, path: Path, saves: int) -> Sample:
    """Save again and again; figures: bytes that resident memory grows by with each save."""
    contestant, tensors = seat.entries[entry], seat.states[state]
    sizes: list[int] = []
    begin = time.perf_counter()
    for _ in range(saves):
        pending = getattr(contestant, verb)(tensors, path)
        if verb == "begin":
            pending.result()
        sizes.append(resident())
    half = np.array(sizes[len(sizes) // 2 :], dtype=float)
    slope = float(np.polyfit(np.arange(len(half)), half, 1)[0])
    figures = {"slope": slope, "grown": float(sizes[-1] - sizes[len(sizes) // 2]), "saves": saves}
    return Sample(begin, time.perf_counter(), figures=figures)


def loop(seat: Any, entry: str, state: str, path: Path, count: int) -> tuple[Sample, list[float]]:
    """Steps of a training loop, `count` of them while a save is running; seconds of each.

    As in training, nobody waits for a save: between two steps the loop looks whether it is done.
    The sample is the round's 99th percentile.
    """
    from bench.competitors import copies_by

    begin = getattr(seat.entries[entry], "begin", None)
    step, steps, saves = _step(), list[float](), 0
    pending, target = None, path
    while len(steps) < count:
        if begin is not None and pending is None:
            target = path.with_name(f"{path.name}-{saves}")
            pending = begin(seat.states[state], target)
            saves += 1
        # Threads of OpenMP that a save has left behind make those of others four times as slow.
        with copies_by(1):
            before = time.perf_counter()
            step()
            steps.append(time.perf_counter() - before)
        if pending is not None and (pending.done() or len(steps) == count):
            pending.result()
            pending = None
            shutil.rmtree(target, ignore_errors=True)
    figures = {"saves": saves, "round_p50": percentile(steps, 0.5)}
    return Sample(0.0, percentile(steps, 0.99), figures=figures), steps


def _step() -> Callable[[], None]:
    """Some 4 ms of mostly Python: what small models, data loading and logging are made of."""
    import torch

    weight, inputs = torch.eye(64), torch.ones(64, 64)

    def step() -> None:
        total, x = 0, inputs
        for _ in range(40):
            total += sum(value & 7 for value in range(1500))
            x = torch.tanh(x @ weight)
        if total < 0:
            raise AssertionError("the sum of what is not negative")

    return step
