"""Functions of single workloads that run in a rank process, with its `RankWorker`."""

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
"""Bytes that one checksum covers."""


def slice_of(worker: Any, entry: str, state: str, path: Path, check: bool) -> Sample:
    """Read the second quarter of the columns of the only tensor of the state."""
    (tensor,) = worker.states[state].values()
    height, width = tensor.shape
    first, last = width // 4, width // 2
    found: list[np.ndarray] = []
    contestant = worker.entries[entry]
    sample = timed(lambda: found.append(contestant.columns(tensor, first, last, path)))
    if check:
        expected = tensor[:, first:last].contiguous().numpy()
        same = np.array_equal(found[0].view(np.int32), expected.view(np.int32))
        if not same:
            raise AssertionError("the slice differs from what was saved")
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


def memory_over(worker: Any, entry: str, state: str, verb: str, path: Path, saves: int) -> Sample:
    """Save repeatedly; the figures are the growth of resident memory in bytes per save."""
    contestant, tensors = worker.entries[entry], worker.states[state]
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


def loop(worker: Any, entry: str, state: str, path: Path, count: int) -> tuple[Sample, list[float]]:
    """Run a training loop of `count` steps beside saves; return the sample and the step times.

    As in training, the loop never waits for a save: it checks between two steps whether the save
    is done. The sample is the 99th percentile of the round.
    """
    from bench.competitors import copies_by

    begin = getattr(worker.entries[entry], "begin", None)
    step, steps, saves = _step(), list[float](), 0
    pending, target = None, path
    while len(steps) < count:
        if begin is not None and pending is None:
            target = path.with_name(f"{path.name}-{saves}")
            pending = begin(worker.states[state], target)
            saves += 1
        # OpenMP threads that a save leaves behind make those of later entries four times as slow.
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
    """Return a step of about 4 ms, mostly Python, like that of small models and data loading."""
    import torch

    weight, inputs = torch.eye(64), torch.ones(64, 64)

    def step() -> None:
        total, x = 0, inputs
        for _ in range(40):
            total += sum(value & 7 for value in range(1500))
            x = torch.tanh(x @ weight)
        if total < 0:
            raise AssertionError("a sum of values that are not negative is negative")

    return step
