"""Timed calls and the statistics of their samples: medians, spreads, ratios of pairs."""

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
    """The measurements of one call, on one rank or (joined) on all.

    Attributes:
        begin, end: seconds of the monotonic clock, which all processes share.
        cpu: seconds of processor time of all threads.
        peak: the highest resident memory during the call beyond that before it, in bytes.
        read: bytes read by system calls, which excludes mapped files.
        figures: further values that the call returned.
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
    """Measure one call; the values that it returns become the figures of the sample."""
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
    """Join the samples of a call of all ranks: from the first begin to the last end.

    Processor time, memory and bytes are summed, also in the figures. Of other figures, which are
    times, the longest is taken.
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
    """Return the resident memory of this process in bytes."""
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _forget_peak() -> None:
    """Reset VmHWM to the present resident memory; without the permission, peaks read too high."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _read_by_calls() -> int:
    with open("/proc/self/io") as file:  # noqa: PTH123 (three times as fast as a Path)
        return int(file.readline().split()[1])


@dataclass
class Series:
    """The measurements of one contestant in a workload.

    Attributes:
        label: the name that is shown; settings: the fastest of the settings that were tried.
        role: "ours", "stock", "other" or "limit".
        seconds: the time of each round, None where it did not take part.
        first, first_peak: seconds and peak memory of its first call, before the rounds.
        figures: one value per round, by name.
        error: the error that stopped it, "" for none.
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
        """Append the sample of the next round; None if it does not take part."""
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
    """The result of one workload, as it is stored and shown.

    Attributes:
        name: the name of the workload; title: the heading that is shown.
        group: results of one group share a panel of the picture.
        work: the kind of its samples: "save", "load", "stall", ...
        nbytes: bytes that all ranks move together; items: the number of tensors, where it matters.
        limit: the key of the series that is the limit of the machine.
        notes: sentences on how it was measured.
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
    """Return the time of `first` divided by that of `second` for each round that both ran in.

    A ratio above 1 means that the second one is faster.
    """
    rounds = zip(first.seconds, second.seconds, strict=False)
    return [a / b for a, b in rounds if a is not None and b is not None and b > 0]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share (0 to 1) of all values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def store(result: Result, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(asdict(result)), indent=1, ensure_ascii=False)
    temporary = folder / f".{result.name}.json"
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(folder / f"{result.name}.json")


def stored(folder: Path) -> dict[str, Result]:
    """Return the last result of each workload in the folder, by name."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("[a-z]*.json"))]
    return {one["name"]: _result(one) for one in found}


def _result(record: Mapping[str, Any]) -> Result:
    known = {each.name for each in fields(Result)} - {"series"}
    result = Result(**{name: record[name] for name in known if name in record})
    result.series = {key: Series(**one) for key, one in record.get("series", {}).items()}
    return result


def _rounded(value: Any) -> Any:
    """Round floats to six digits, more than the clock resolves."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
