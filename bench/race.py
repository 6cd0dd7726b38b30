"""Rounds: every entry runs once per round, in another order each time."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import Result, Sample, Series, join
from bench.ranks import RankError, RankPool

__all__ = ["LONG", "Act", "Bench", "Entry", "Race", "fresh"]

SLOW = 45.0
"""Seconds after which an entry that no target names skips the remaining rounds."""
LONG = 240.0
"""Seconds after which no further round of a workload begins."""


@dataclass(frozen=True)
class Bench:
    """The settings of a run.

    Attributes:
        folder: the folder for temporary files, on the disk that is measured.
        rounds: rounds per workload; nbytes: approximate size of a state.
        ranks: processes of the distributed workloads.
        counts: numbers of tensors in the workloads with many small ones.
        steps: steps of the training loop per round; saves: saves of the memory workload.
        say: prints a line of progress.
    """

    folder: Path
    rounds: int
    nbytes: int
    ranks: int = 4
    counts: tuple[int, ...] = (20_000, 100_000)
    steps: int = 1500
    saves: int = 200
    say: Callable[[str], None] = print


@dataclass(frozen=True)
class Entry:
    """One contestant in one workload.

    Attributes:
        key: the key of its series; who: a key of `competitors.MAKERS`; label: the shown name.
        role: "ours", "stock", "limit" (these take part in every round) or "other".
        state: the name of the state that it saves or fills.
        uses: the contestant whose checkpoint it loads, if not its own.
        variants: settings that are tried before the rounds; the fastest is taken.
    """

    key: str
    label: str
    who: str = ""
    role: str = "other"
    state: str = "state"
    uses: str = ""
    variants: tuple[Mapping[str, Any], ...] = ({},)
    checked: bool = True

    @property
    def contestant(self) -> str:
        return self.who or self.key

    @property
    def source(self) -> str:
        return self.uses or self.contestant


Act = Callable[[Entry, bool], list[Sample]]
"""Runs an entry once, given whether this is a trial; returns the samples of all ranks."""


@dataclass
class Race:
    """The entries of one workload and their results.

    Attributes:
        seconds: time after which no further round begins.
    """

    bench: Bench
    pool: RankPool
    result: Result
    entries: Sequence[Entry]
    seconds: float = LONG

    def run(self, act: Act, *, trials: int = 2) -> Result:
        """Run the trials, then the rounds. An entry that fails gets its error; the others go on."""
        left = [entry for entry in self.entries if self._enter(entry, act, trials)]
        # Each run shuffles in the same way, so that repeated runs are comparable.
        order, began = random.Random(self.result.name), time.monotonic()
        for number in range(self.bench.rounds):
            if number and time.monotonic() - began > self.seconds:
                self.result.notes.append(
                    f"Stopped after {number} rounds, when the time limit was reached."
                )
                break
            turn = [entry for entry in left if not self._too_slow(entry)]
            order.shuffle(turn)
            samples: dict[str, Sample] = {}
            for entry in turn:
                found = self._try(entry, lambda entry=entry: act(entry, False))
                if found is None:
                    left.remove(entry)
                else:
                    samples[entry.key] = join(found)
            for key, series in self.result.series.items():
                series.add(samples.get(key))
            self.bench.say(f"  round {number + 1}: {self._summary(samples)}")
        for entry in left:
            self._quietly("leave", entry.key)
        self.result.series = {entry.key: self.result.series[entry.key] for entry in self.entries}
        return self.result

    def _enter(self, entry: Entry, act: Act, trials: int) -> bool:
        """Find the best settings of an entry; return whether it works."""
        series = self.result.series.setdefault(entry.key, Series(entry.label, entry.role))
        if series.error:
            return False
        best: tuple[list[Sample], Mapping[str, Any]] | None = None
        for settings in entry.variants:
            found = self._try(
                entry, lambda settings=settings: self._trial(entry, settings, act, trials)
            )
            if found is not None and (best is None or found[-1].seconds < best[0][-1].seconds):
                best = found, settings
        if best is None:
            return False
        (first, *_), settings = best
        series.first, series.first_peak, series.error = first.seconds, first.peak, ""
        series.settings = ", ".join(f"{name}={value}" for name, value in settings.items())
        if len(entry.variants) > 1:
            self._take(entry, settings)
        return True

    def _trial(
        self, entry: Entry, settings: Mapping[str, Any], act: Act, trials: int
    ) -> list[Sample]:
        self._take(entry, settings)
        return [join(act(entry, True)) for _ in range(trials)]

    def _take(self, entry: Entry, settings: Mapping[str, Any]) -> None:
        self.pool.drop("enter", entry.key)
        self.pool.keep("enter", entry.key, entry.contestant, settings)

    def _try(self, entry: Entry, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RankError as error:
            self.result.series[entry.key].error = str(error)
            self.bench.say(f"  {entry.label}: {error}")
            self.pool.drop("enter", entry.key)
            return None

    def _quietly(self, method: str, *args: Any) -> None:
        try:
            self.pool.all(method, *args)
        except RankError as error:
            self.bench.say(f"  {method} {args}: {error}")

    def _too_slow(self, entry: Entry) -> bool:
        times = self.result.series[entry.key].times
        return entry.role == "other" and len(times) > 1 and sum(times) > SLOW

    def _summary(self, samples: Mapping[str, Sample]) -> str:
        return "  ".join(f"{key} {sample.seconds:.3f}" for key, sample in samples.items())


def fresh(folder: Path, name: str) -> Path:
    """Return a path in a folder at which nothing exists."""
    path = folder / name
    shutil.rmtree(path, ignore_errors=True)
    return path
