"""One timed call, the samples of many, and what can be said of them: medians, spreads, pairs."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

__all__ = [
    "Result",
    "Sample",
    "Series",
    "join",
    "paired",
    "percentile",
    "resident",
    "store",
    "stored",
    "timed",
]


@dataclass(frozen=True)
class Sample:
    """One call, on one rank or (joined) on all.

    Attributes:
        begin, end: seconds of the machine's monotonic clock, the same one for all processes.
        cpu: seconds of processor time, all threads.
        peak: bytes of resident memory at most during the call, beyond those before it.
        read: bytes that system calls read; those of mapped files don't count.
        figures: what else the call told.
    """

    begin: float
    end: float
    cpu: float = 0.0
    peak: int = 0
    read: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def timed(call: Callable[[], Mapping[str, float] | None]) -> Sample:
    """Make one call; what it returns becomes the sample's figures."""
    gc.collect()
    _forget_peak()
    resident_before, read_before = resident(), _read_by_calls()
    cpu, begin = time.process_time(), time.perf_counter()
    figures = call()
    end, cpu = time.perf_counter(), time.process_time() - cpu
    return Sample(
        begin,
        end,
        cpu,
        max(0, _status("VmHWM") - resident_before),
        _read_by_calls() - read_before,
        dict(figures or {}),
    )


def join(samples: Sequence[Sample]) -> Sample:
    """One call that all ranks made together: from the first one's begin to the last one's end.

    Processor time, memory and bytes are those of all ranks; so are figures that are bytes, and
    times are the longest.
    """
    figures: dict[str, float] = {}
    for name in samples[0].figures:
        values = [sample.figures[name] for sample in samples]
        figures[name] = sum(values) if name in SUMMED else max(values)
    return Sample(
        min(sample.begin for sample in samples),
        max(sample.end for sample in samples),
        sum(sample.cpu for sample in samples),
        sum(sample.peak for sample in samples),
        sum(sample.read for sample in samples),
        figures,
    )


SUMMED = ("bytes_read", "bytes_needed", "bytes_rounded")


def resident() -> int:
    """Bytes of this process that are in memory."""
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _forget_peak() -> None:
    """VmHWM starts anew from what is resident now; without that right peaks read too high."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _read_by_calls() -> int:
    with open("/proc/self/io") as file:  # noqa: PTH123 (three times as fast as a Path)
        return int(file.readline().split()[1])


@dataclass
class Series:
    """What one contestant did in a workload.

    Attributes:
        label: who, for people; settings: how it was set, as found by trying.
        role: "ours", "stock", "other" or "limit".
        seconds: of each round, None where it did not take part.
        first, first_peak: seconds and peak memory of its first call, before the rounds.
        figures: name -> a value for each of its rounds.
        error: why it has no, or no more, samples.
    """

    label: str
    role: str = "other"
    settings: str = ""
    first: float | None = None
    first_peak: int = 0
    seconds: list[float | None] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)
    error: str = ""

    def add(self, sample: Sample | None) -> None:
        """The next round's; None if it does not take part."""
        self.seconds.append(None if sample is None else sample.seconds)
        if sample is None:
            return
        self.cpu.append(sample.cpu)
        self.peak.append(sample.peak)
        self.read.append(sample.read)
        for name, value in sample.figures.items():
            self.figures.setdefault(name, []).append(value)

    @property
    def times(self) -> list[float]:
        return [seconds for seconds in self.seconds if seconds is not None]

    @property
    def median(self) -> float | None:
        return statistics.median(self.times) if self.times else None


@dataclass
class Result:
    """One workload, as it is stored and shown.

    Attributes:
        name: of the workload, and what it is about; title: for people.
        group: results that are shown in one picture.
        work: what each sample is: "save", "load", "stall", ...
        nbytes: bytes that all ranks moved together; items: tensors, where their number matters.
        limit: which series is the machine's own.
        notes: how it was done, as sentences.
    """

    name: str
    title: str
    group: str
    work: str
    ranks: int
    nbytes: int
    items: int = 0
    limit: str = ""
    date: str = ""
    machine: Mapping[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    series: dict[str, Series] = field(default_factory=dict)
    error: str = ""


def paired(first: Series, second: Series) -> list[float]:
    """`first`'s time over `second`'s, round by round: only what ran in one round is compared.

    Above 1 the second one is faster.
    """
    rounds = zip(first.seconds, second.seconds, strict=False)
    return [a / b for a, b in rounds if a is not None and b is not None and b > 0]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share (0 to 1) of all does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def store(result: Result, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(asdict(result)), indent=1, ensure_ascii=False)
    temporary = folder / f".{result.name}.json"
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(folder / f"{result.name}.json")


def stored(folder: Path) -> dict[str, Result]:
    """The last result of each workload in the folder, by name."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("[a-z]*.json"))]
    return {one["name"]: _result(one) for one in found}


def _result(record: Mapping[str, Any]) -> Result:
    known = {each.name for each in fields(Result)} - {"series"}
    result = Result(**{name: record[name] for name in known if name in record})
    result.series = {key: Series(**one) for key, one in record.get("series", {}).items()}
    return result


def _rounded(value: Any) -> Any:
    """Six digits are more than any clock here can tell."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
