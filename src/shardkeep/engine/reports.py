"""What a save reports when it has ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardkeep.util.formatting import count, human_bytes

__all__ = ["SaveReport"]


@dataclass(frozen=True, slots=True)
class SaveReport:
    """The result of a save, as `save` and `SaveHandle.result` return it.

    Attributes:
        path: where the checkpoint is.
        save_id: the id of the save, which is part of the names of its files.
        tensors: how many tensors the checkpoint holds.
        objects: how many other objects it holds.
        nbytes: the bytes of all data files, of all ranks.
        written: the bytes that this rank wrote.
        seconds: the seconds that this rank spent in each phase: "plan" (agree on which rank writes
            what), "stage" (copy the state, asynchronous saves only), "write", "sync" (wait until
            the files are durable) and "commit".
        slowest: the rank that took longest until its files were durable, and its seconds.

    Example:
        >>> report = shardkeep.save(state, "run/step_100")
        >>> report.nbytes, report.seconds["write"]
        (2040109466, 0.88)
        >>> print(report)
        saved 1.9 GiB in 0.93 s, this rank 1.9 GiB (2.2 GB/s): plan 0.02, write 0.88, ...
    """

    path: str
    save_id: str
    tensors: int
    objects: int
    nbytes: int
    written: int
    seconds: Mapping[str, float]
    slowest: tuple[int, float]

    @property
    def rate(self) -> float:
        """The rate at which this rank wrote until its files were durable, in GB/s (10^9 bytes)."""
        spent = self.seconds.get("write", 0.0) + self.seconds.get("sync", 0.0)
        return self.written / spent / 1e9 if spent else 0.0

    def __str__(self) -> str:
        return (
            f"saved {human_bytes(self.nbytes)} in {sum(self.seconds.values()):.2f} s, this rank "
            f"{human_bytes(self.written)} ({self.rate:.1f} GB/s): "
            + ", ".join(f"{phase} {spent:.2f}" for phase, spent in self.seconds.items())
            + f"; slowest rank {self.slowest[0]}, {self.slowest[1]:.2f} s"
        )

    def __repr__(self) -> str:
        return (
            f"<SaveReport: {self.path}, {count(self.tensors, 'tensor')}, "
            f"{count(self.objects, 'object')}, {human_bytes(self.nbytes)} in "
            f"{sum(self.seconds.values()):.2f} s>"
        )
