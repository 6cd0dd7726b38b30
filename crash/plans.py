"""Plans of whom to kill when, drawn from a seed so that each moment can be repeated."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from crash.notes import PHASES

__all__ = ["KNOBS", "MODES", "Plan", "draw"]

KNOBS = {
    "SHARDKEEP_HEARTBEAT_SECONDS": "0.1",
    "SHARDKEEP_MAX_MISSED_HEARTBEATS": "5",
    "SHARDKEEP_DEADLINE_SECONDS": "1.5",
    "OMP_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "FATAL",
}
"""Shorter timeouts than the defaults, as a run waits for the death of many ranks. During a save the
heartbeat detects it, between two saves the deadline. The report states these values.
"""

MODES = ("sync", "async", "overwrite", "manager")


@dataclass(frozen=True)
class Plan:
    """One kill.

    Attributes:
        seed: the seed of all random choices.
        number: the number of the moment, from 0.
        mode: the way to save.
        folder: the folder to save to, named after the mode.
        whom: "one" rank or "all"; "none" to measure how long the phases take.
        rank: the rank that is killed, or that triggers the kill of all.
        save, phase: the delay starts when that rank begins this phase of its nth save; without a
            phase, when the rank starts.
        delay: seconds from then to the kill.
    """

    seed: int
    number: int
    mode: str
    folder: Path
    whom: str
    rank: int
    save: int
    phase: str | None
    delay: float


def draw(
    seed: int, number: int, root: Path, ranks: int, spans: Mapping[tuple[str, str], float]
) -> Plan:
    """Draw the plan of one moment.

    Every second moment is any instant of a job. The others are drawn from one phase, as some
    phases take a hundredth of the time of others.

    Args:
        spans: seconds by mode and phase; those of a whole job by mode and "life".
    """
    chance = random.Random(f"{seed} {number}")
    mode = MODES[number % len(MODES)]
    whom, rank = chance.choice(["one", "all"]), chance.randrange(ranks)
    phase = None
    if chance.random() < 0.5:
        # Only the coordinator, rank 0, has the phases of the commit.
        phase = chance.choice([one for one in PHASES[1:] if (mode, one) in spans])
        if phase in ("lease", "manifest", "publish", "clean"):
            rank = 0
    delay = chance.uniform(0.0, spans[mode, phase or "life"])
    return Plan(seed, number, mode, root / mode, whom, rank, chance.randint(1, 3), phase, delay)
