"""The report of a load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shardkeep.util.formatting import count, human_bytes

__all__ = ["LoadReport"]


@dataclass(frozen=True, slots=True, repr=False)
class LoadReport:
    """What a load did, or why it refused to load. Names are flat names of the checkpoint.

    Attributes:
        path: the path of the checkpoint.
        loaded: tensors and objects that now have the saved values.
        resharded: the loaded tensors that this rank put together from other boxes than its own.
            A large box that was saved as several chunks is not counted.
        missing: names that the template has and the checkpoint does not; they are left untouched.
        unexpected: names that the checkpoint has and the template does not.
        cast: loaded tensors that have another dtype in the template: name -> (stored, wanted).
        skipped: `PerRank` values of another number of ranks, which `per_rank` left untouched.
        refused: name -> why it cannot be loaded; only in the report of a `Mismatch`.
        unchecked: tensors of which this rank read bytes that no checksum covers.
        nbytes: bytes of tensor data that this rank needed.
        read: bytes that this rank read for them.
        bytes_unchecked: how many of the needed bytes are unchecked.
        seconds: phase -> seconds that this rank spent in it: "plan" (open the checkpoint, describe
            the template, compare both, plan the reads), "read" (read, check, put in place) and
            "restore" (cast, replace values, `load_state_dict`).
        slowest: the rank that took longest, and its seconds in total.

    Example:
        >>> report = shardkeep.load(state, "run/step_100")
        >>> print(report)
        loaded 1.9 GiB in 0.21 s (10.7 GB/s): plan 0.02, read 0.19, restore 0.00; slowest rank 3, 0.23 s
        >>> report.unexpected
        ('model.old_head.weight',)
    """  # noqa: E501

    path: str
    loaded: tuple[str, ...] = ()
    resharded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    cast: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    unchecked: tuple[str, ...] = ()
    nbytes: int = 0
    read: int = 0
    bytes_unchecked: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    slowest: tuple[int, float] = (0, 0.0)

    @property
    def rate(self) -> float:
        """GB (10^9 bytes) of needed data per second of the phase "read"; 0.0 without any."""
        seconds = self.seconds.get("read", 0.0)
        return self.nbytes / seconds / 1e9 if seconds else 0.0

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in self.seconds.items())
        rank, longest = self.slowest
        return (
            f"loaded {human_bytes(self.nbytes)} in {total:.2f} s ({self.rate:.1f} GB/s): {phases}; "
            f"slowest rank {rank}, {longest:.2f} s" + self._unchecked_part()
        )

    def __repr__(self) -> str:
        if self.refused:
            return f"<LoadReport: {self.path}, {count(len(self.refused), 'name')} refused>"
        loaded = f"loaded {count(len(self.loaded), 'name')}, {human_bytes(self.nbytes)}"
        return f"<LoadReport: {self.path}, {loaded}>"

    def _unchecked_part(self) -> str:
        if not self.unchecked:
            return ""
        tensors = count(len(self.unchecked), "tensor")
        return f"; unchecked: {human_bytes(self.bytes_unchecked)} of {tensors}"
