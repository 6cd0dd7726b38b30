"""Results of comparisons, as values and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
"""The folder of the results: one file for each release, from its last run."""


@dataclass(frozen=True)
class Outcome:
    """The result of one case in one direction.

    Attributes:
        case: its name.
        leaves: the number of compared tensors and values.
        differences: those that differ from what was saved, or why nothing was loaded.
        absent: why the release cannot have this case, in which case nothing was compared.
        left_out: leaves that the release cannot have or did not store, or that need trust.
        spread: the number of leaves that were sharded over ranks.
    """

    case: str
    leaves: int = 0
    differences: tuple[str, ...] = ()
    absent: str = ""
    left_out: tuple[str, ...] = ()
    spread: int = 0


@dataclass(frozen=True)
class Direction:
    """The results of all cases from one writer to one reader."""

    key: str
    outcomes: tuple[Outcome, ...]

    @property
    def cases(self) -> int:
        """The number of cases that were compared."""
        return sum(not one.absent for one in self.outcomes)

    @property
    def leaves(self) -> int:
        return sum(one.leaves for one in self.outcomes)

    @property
    def spread(self) -> int:
        return sum(one.spread for one in self.outcomes)

    @property
    def equal(self) -> int:
        """The number of leaves that were loaded as they were saved."""
        return sum(max(0, one.leaves - len(one.differences)) for one in self.outcomes)

    @property
    def differences(self) -> tuple[str, ...]:
        return tuple(f"{one.case}{line}" for one in self.outcomes for line in one.differences)

    @property
    def absent(self) -> dict[str, str]:
        return {one.case: one.absent for one in self.outcomes if one.absent}

    @property
    def left_out(self) -> tuple[str, ...]:
        return tuple(f"{one.case}: {line}" for one in self.outcomes for line in one.left_out)


@dataclass(frozen=True)
class Result:
    """The results of one release, in all directions."""

    release: str
    python: str
    numpy: str
    writer: str
    date: str
    seed: int
    seconds: float
    directions: tuple[Direction, ...]

    @property
    def same(self) -> bool:
        return not any(direction.differences for direction in self.directions)

    def direction(self, key: str) -> Direction | None:
        return next((one for one in self.directions if one.key == key), None)

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON: the counts, and for each case what the counts omit."""
        fields = asdict(self) | {"same": self.same}
        fields["directions"] = {
            one.key: {
                "cases": one.cases,
                "leaves": one.leaves,
                "equal": one.equal,
                "spread": one.spread,
                "differences": list(one.differences),
                "absent": one.absent,
                "left_out": list(one.left_out),
                "leaves_of": {o.case: o.leaves for o in one.outcomes if not o.absent},
            }
            for one in self.directions
        }
        return fields


def store(result: Result, folder: Path = RESULTS) -> None:
    folder.mkdir(exist_ok=True)
    text = json.dumps(result.to_json(), indent=1, ensure_ascii=False)
    (folder / f"{result.release}.json").write_text(text + "\n", encoding="utf-8")


def stored(folder: Path = RESULTS) -> list[Mapping[str, Any]]:
    """Return the stored results, oldest release first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(found, key=lambda one: tuple(map(int, one["release"].split("."))))


def total(directions: Iterable[Mapping[str, Any]], field: str) -> int:
    return sum(direction[field] for direction in directions)
