"""When whom to kill: drawn from a seed, so that each moment can be had again."""

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
"""The death of a rank is noticed sooner than by default, as there are many of them: during a save
by its signs of life, between two saves by the deadline. The report says so.
"""

MODES = ("sync", "async", "overwrite", "manager")


@dataclass(frozen=True)
class Plan:
    """One kill.

    Attributes:
        seed: what all is drawn from.
        number: of the moment, from 0.
        mode: how is saved.
        folder: where to; its name is the mode's.
        whom: "one" rank or "all"; "none" to see how long all takes.
        rank: who dies, or whose clock it is.
        save, phase: the clock starts when that rank begins this phase of its nth save; without
            a phase, when it begins to live.
        delay: seconds from then on.
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
    """The plan of one moment.

    Every second moment is any instant of a life. The others are sought in one phase, as some take
    a hundredth of the time of others.

    Args:
        spans: seconds, by mode and phase; of a whole life by mode and "life".
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
