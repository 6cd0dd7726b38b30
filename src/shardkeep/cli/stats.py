"""Statistics of a tensor, a part at a time: memory does not grow with the tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.checkpoint.reader import CheckpointReader
from shardkeep.cli.boxes import slabs
from shardkeep.cli.terminal import CommandError
from shardkeep.types import Box, DType, Progress

__all__ = ["Stats", "statistics", "widened"]

_PART = 1 << 21
"""Elements that are read and looked at at once: 16 MiB of float64."""


@dataclass(slots=True)
class Stats:
    """What was found so far. Least, most and mean are of the finite elements; None without any."""

    least: float | int | None = None
    most: float | int | None = None
    nan: int = 0
    inf: int = 0
    finite: int = 0
    total: complex = 0.0

    @property
    def mean(self) -> complex | float | None:
        if not self.finite:
            return None
        mean = self.total / self.finite
        return mean if isinstance(mean, float) or mean.imag else mean.real

    def add(self, values: NDArray[Any]) -> None:
        """Count in some more elements."""
        if values.dtype.kind in "fc":
            nan = np.isnan(values)
            finite = np.isfinite(values)
            self.nan += int(nan.sum())
            self.inf += int((~nan & ~finite).sum())
            values = values[finite]
        if not values.size:
            return
        self.finite += values.size
        if values.dtype.kind == "c":
            self.total += complex(values.sum(dtype=np.complex128))
            return
        self.total += float(values.sum(dtype=np.float64))
        least, most = values.min().item(), values.max().item()
        self.least = least if self.least is None else min(least, self.least)
        self.most = most if self.most is None else max(most, self.most)


def statistics(checkpoint: CheckpointReader, name: str, box: Box, progress: Progress) -> Stats:
    """Read a box of a tensor part by part. `Damaged` where bytes do not match their digests.

    Raises:
        CommandError: numpy only carries the bits of this dtype.
    """
    dtype, _ = checkpoint.dtype_and_shape(name)
    if dtype.note and dtype.name != "complex32":
        raise CommandError(f"{dtype} has no statistics: what is read is {dtype.note}", 2)
    stats, done, total = Stats(), 0, box.numel * dtype.itemsize
    for part in slabs(box, _PART):
        stats.add(widened(checkpoint.read(name, part), dtype).ravel())
        done += part.numel * dtype.itemsize
        progress("read", done, total)
    return stats


def widened(values: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """Elements as numpy itself can print and add them: float32 for bfloat16 and float8."""
    if dtype.name == "complex32":
        parts = values["real"].astype(np.float32), values["imag"].astype(np.float32)
        return np.asarray(parts[0] + 1j * parts[1])
    if values.dtype.kind == "V" or dtype.name.startswith(("bfloat", "float8")):
        return values.astype(np.float32)
    return values
