"""The claims of the demo with their evidence: pure functions of the logs of the jobs."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

__all__ = [
    "Claim",
    "Killed",
    "Run",
    "goes_on",
    "holds_the_same",
    "learns",
    "nothing_left",
    "reads_the_same",
    "repeats",
    "saves",
]

Record = dict[str, Any]

_TAIL = 10
"""The number of steps that a loss is averaged over, as single losses are noisy."""

_APART = 0.05
"""The average difference in nats allowed between two runs with other dropout masks."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence, the evidence, and whether the evidence supports the sentence."""

    says: str
    evidence: str
    holds: bool


@dataclass(slots=True)
class Run:
    """The log of one job."""

    ranks: int
    steps: list[Record] = field(default_factory=list)
    saves: list[Record] = field(default_factory=list)
    resumed: Record = field(default_factory=dict)
    compared: list[Record] = field(default_factory=list)

    def take(self, record: Record) -> None:
        for key, place in (
            ("step", self.steps),
            ("saved", self.saves),
            ("compared", self.compared),
        ):
            if key in record:
                place.append(record)
        if "resumed" in record:
            self.resumed = record

    @property
    def curve(self) -> dict[int, float]:
        """Return the loss by step."""
        return {record["step"]: record["loss"] for record in self.steps}

    @property
    def rates(self) -> dict[int, float]:
        """Return the learning rate by step."""
        return {record["step"]: record["lr"] for record in self.steps}


@dataclass(frozen=True, slots=True)
class Killed:
    """How a job was killed: the signal that ended each process, when, and what remained."""

    signals: Sequence[int]
    seconds: float
    left: int
    folders: int
    opened: int


def saves(run: Run, every: int) -> Claim:
    seconds = [record["seconds"] for record in run.saves]
    size = sum(path.stat().st_size for path in Path(run.saves[-1]["path"]).iterdir())
    return Claim(
        f"{run.ranks} ranks save together",
        f"{len(seconds)} checkpoints of {_size(size)}, durable in {median(seconds):.2f} s each "
        f"(median; slowest {max(seconds):.2f} s)",
        len(seconds) == len(run.steps) // every > 0,
    )


def nothing_left(run: Run, killed: Killed) -> Claim:
    ended = sum(number == signal.SIGKILL for number in killed.signals)
    step = len(run.steps) + 1
    return Claim(
        "All processes are killed in the middle of a step, and nothing is left to clean up",
        f"SIGKILL ended {ended} of {run.ranks + 1} processes {killed.seconds:.2f} s into step "
        f"{step}; {killed.left} processes left; {killed.opened} of {killed.folders} step folders "
        f"open",
        ended == len(killed.signals) == run.ranks + 1
        and killed.left == 0
        and killed.opened == killed.folders == len(run.saves),
    )


def holds_the_same(run: Run, before: Run, checkpoint: Path) -> Claim:
    """Check that every rank held, after loading and before its first step, what was saved."""
    found = [record["compared"] for record in run.compared]
    names = {name for each in found for name in each["tensors"]}
    absent = set.intersection(*(set(each["absent"]) for each in found))
    gone = {f"rng.rank_{rank}" for rank in range(run.ranks, before.ranks)}
    differ = {name for each in found for name in each["differ"]}
    kinds = {
        "of the model": sum(name.startswith("model.") for name in names),
        "AdamW moments": sum(name.endswith((".exp_avg", ".exp_avg_sq")) for name in names),
        "AdamW steps": sum(name.endswith(".step") for name in names),
        "RNG states": sum(name.startswith("rng.") for name in names),
    }
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return Claim(
        f"{run.ranks} ranks resume, and hold what {before.ranks} ranks saved, bit for bit",
        f"{len(names)} tensors ({counts}) and {len(found[0]['values'])} values, "
        f"{_size(sum(each['nbytes'] for each in found))} on {len(found)} ranks: {len(differ)} "
        f"differ; {run.compared[0]['resharded']} tensors resharded; loaded in "
        f"{run.resumed['seconds']:.2f} s",
        len(found) == run.ranks
        and not differ
        and absent == gone
        and min(kinds.values()) > 0
        and run.resumed["path"] == str(checkpoint)
        and run.resumed["resumed"] == before.saves[-1]["saved"],
    )


def repeats(run: Run, before: Run) -> Claim:
    """Check that the lost steps repeat exactly on the same number of ranks."""
    again, once = run.curve, before.curve
    lost = sorted(again.keys() & once.keys())
    same = sum(again[step] == once[step] for step in lost)
    return Claim(
        f"On {run.ranks} ranks, the steps lost in the kill repeat exactly: data position, RNG, "
        "schedule",
        f"steps {lost[0]} to {lost[-1]}: {same} of {len(lost)} losses equal to the last bit",
        same == len(lost) == len(before.steps) - before.saves[-1]["saved"] > 0,
    )


def goes_on(run: Run, reference: Run) -> Claim:
    mine, theirs = run.curve, reference.curve
    apart = mean(abs(mine[step] - theirs[step]) for step in mine.keys() & theirs.keys())
    return Claim(
        f"On {run.ranks} ranks, the loss goes on where it was",
        f"{len(mine)} steps: {apart:.4f} nats from the uninterrupted run on average (only dropout "
        f"differs); the last {_TAIL}: {_end(mine):.3f}, uninterrupted {_end(theirs):.3f}; learning "
        f"rates equal",
        mine.keys() == theirs.keys() and apart < _APART and run.rates == reference.rates,
    )


def reads_the_same(kind: str, found: Mapping[str, Any]) -> Claim:
    """Check the result of one of the readers in `demo.checks`."""
    says, imported = {
        "stock": ("Stock torch.distributed.checkpoint", ["torch"]),
        "bare": ("shardkeep.open, without torch,", ["shardkeep"]),
    }[kind]
    wrong = [*found["differ"], *found["absent"]]
    return Claim(
        f"{says} reads the same, bit for bit",
        f"{len(found['tensors'])} tensors and {len(found['values'])} values, "
        f"{_size(found['nbytes'])}: {len(wrong)} differ; {found['seconds']:.2f} s; imported: "
        f"{', '.join(found['imported'])} {found['version']}",
        not wrong and len(found["tensors"]) > 0 and found["imported"] == imported,
    )


def learns(before: Run, after: Run, below: float) -> Claim:
    first, end = before.curve[1], _end(after.curve)
    return Claim(
        "The model learns from real text",
        f"loss {first:.2f} at first, {_end(before.curve):.2f} before the kill, {end:.2f} at the "
        f"end (step {after.steps[-1]['step']})",
        end < min(first, below),
    )


def _end(curve: Mapping[int, float]) -> float:
    return mean(list(curve.values())[-_TAIL:])


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
