"""Recordings of the state of a job, made without Shardkeep and compared bit for bit.

At every save, rank 0 records every sharded tensor, gathered by torch itself, and every rank its own
tensors and values. The job after a load, and other readers, are compared with these recordings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Comparison", "Holdings", "leaves", "plain"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The names of equal tensors and values, and of different and missing ones."""

    tensors: list[str]
    nbytes: int
    values: list[str]
    differ: list[str]
    absent: list[str]


@dataclass(frozen=True, slots=True)
class Holdings:
    """The state of all ranks together: arrays, and values as in JSON, by flat name."""

    tensors: Mapping[str, NDArray[Any]]
    values: Mapping[str, Any]

    def write(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"rank_{rank}.npz", **self.tensors)
        (folder / f"rank_{rank}.json").write_text(json.dumps(self.values))

    @staticmethod
    def read(folder: Path) -> Holdings:
        """Read the recordings of all ranks; raise ValueError where two ranks differ in one name."""
        tensors: dict[str, NDArray[Any]] = {}
        values: dict[str, Any] = {}
        for path in sorted(folder.glob("rank_*.npz")):
            with np.load(path) as archive:
                for name in archive.files:
                    array = archive[name]
                    if not same(tensors.setdefault(name, array), array):
                        raise ValueError(f"the ranks hold different tensors {name!r}")
            for name, value in json.loads(path.with_suffix(".json").read_text()).items():
                if values.setdefault(name, value) != value:
                    raise ValueError(f"the ranks hold different values {name!r}")
        return Holdings(tensors, values)

    def compare(self, tensors: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> Comparison:
        """Compare with the tensors and values of another reader."""
        equal = [n for n in self.tensors if n in tensors and same(tensors[n], self.tensors[n])]
        alike = [n for n in self.values if n in values and plain(values[n]) == self.values[n]]
        seen = {**tensors, **values}
        return Comparison(
            tensors=equal,
            nbytes=sum(self.tensors[name].nbytes for name in equal),
            values=alike,
            differ=sorted(seen.keys() - {*equal, *alike}),
            absent=sorted((self.tensors.keys() | self.values.keys()) - seen.keys()),
        )


def same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Return whether two arrays are equal bit for bit, NaNs and signs of zeros included."""
    kinds = (one.dtype, one.shape) == (other.dtype, other.shape)
    return kinds and one.tobytes() == other.tobytes()


def plain(value: Any) -> Any:
    """Return a value as JSON returns it, with lists for tuples."""
    return json.loads(json.dumps(value))


def leaves(state: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield leaves with the flat names of DCP, in which a list without mappings is a leaf."""
    if isinstance(state, Mapping):
        items = list(state.items())
    elif isinstance(state, list) and any(isinstance(part, Mapping) for part in state):
        items = list(enumerate(state))
    else:
        yield prefix.removesuffix("."), state
        return
    for key, part in items:
        yield from leaves(part, f"{prefix}{key}.")


def held(state: Any, *, gathered: bool = True) -> Holdings:
    """Return this rank's state, with sharded tensors gathered (a collective call) or left out."""
    import torch
    from torch.distributed.tensor import DTensor

    tensors, values = {}, {}
    for name, leaf in leaves(state):
        if isinstance(leaf, DTensor):
            whole = leaf.full_tensor()
            if gathered:
                tensors[name] = whole.numpy()
        elif isinstance(leaf, torch.Tensor):
            tensors[name] = leaf.numpy()
        else:
            values[name] = plain(leaf)
    return Holdings(tensors, values)


def main() -> None:
    """Run the job of `demo.train` and record its state."""
    import torch

    from demo import train

    class RecordedTrainer(train.Trainer):
        def run(self) -> None:
            self.append_to_log(pid=os.getpid())
            super().run()

        def save(self) -> Any:
            with torch.no_grad():
                mine = held(self.state(), gathered=self.rank == 0)
            mine.write(self.folder / "recorded" / f"step_{self.step:06d}", self.rank)
            return super().save()

        def resume(self, path: Path) -> Any:
            report = super().resume(path)
            with torch.no_grad():
                mine = held(self.state())
            expected = Holdings.read(self.folder / "recorded" / path.name)
            found = expected.compare(mine.tensors, mine.values)
            self.append_to_log(
                compared=asdict(found), resharded=len(report.resharded), read=report.read
            )
            return report

        def append_to_log(self, **record: Any) -> None:
            train.append(self.folder / "log.jsonl", {"rank": self.rank, **record})

    train.main(RecordedTrainer)


if __name__ == "__main__":
    main()
