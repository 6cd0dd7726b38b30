"""Targets and the measured values. A missed target is shown on the page; it fails no run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from bench.measure import Result, Series, paired

__all__ = ["TARGETS", "Target", "times"]

Results = Mapping[str, Result]


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        work, figure: the work that was done, and the figure that is compared.
        bound: the least value of the figure (with `least`), or its greatest.
        value: returns the figure, or None where it was not measured.
        unit: the unit that is printed after both.
    """

    work: str
    figure: str
    bound: float
    value: Callable[[Results], float | None]
    least: bool = True
    unit: str = ""

    def reached(self, results: Results) -> bool | None:
        value = self.value(results)
        if value is None:
            return None
        return value >= self.bound if self.least else value <= self.bound


def times(result: Result | None, slow: str, fast: str) -> float | None:
    """Return the median over the rounds of the time of `slow` divided by that of `fast`."""
    if result is None or slow not in result.series or fast not in result.series:
        return None
    found = paired(result.series[slow], result.series[fast])
    return statistics.median(found) if found else None


def _of(name: str, slow: str, fast: str) -> Callable[[Results], float | None]:
    return lambda results: times(results.get(name), slow, fast)


def _more(name: str, slow: str, fast: str) -> Callable[[Results], float | None]:
    """Return a function that gives how much longer `slow` takes, in per cent."""

    def value(results: Results) -> float | None:
        found = times(results.get(name), slow, fast)
        return None if found is None else 100 * (found - 1)

    return value


def _read(key: str, over: str) -> Callable[[Results], float | None]:
    def value(results: Results) -> float | None:
        series = _series(results, "slice", key)
        if series is None or over not in series.figures:
            return None
        return series.figures["bytes_read"][-1] / series.figures[over][-1]

    return value


def _checksums(results: Results) -> float | None:
    """Return the checksums' share of a save's processor time in the same round, in per cent."""
    save, crc = _series(results, "checksums", "shardkeep"), _series(results, "checksums", "crc")
    if save is None or crc is None or not save.cpu or "crc" not in crc.figures:
        return None
    pairs = zip(crc.figures["crc"], save.cpu, strict=False)
    return statistics.median(100 * a / b for a, b in pairs)


def _steps(key: str) -> Callable[[Results], float | None]:
    def value(results: Results) -> float | None:
        with_save, alone = (_series(results, "interpreter", one) for one in (key, "alone"))
        if with_save is None or alone is None:
            return None
        if "p99" not in with_save.figures or "p99" not in alone.figures:
            return None
        return with_save.figures["p99"][0] / alone.figures["p99"][0]

    return value


def _series(results: Results, name: str, key: str) -> Series | None:
    result = results.get(name)
    return None if result is None else result.series.get(key)


def _targets() -> Iterator[Target]:
    for ranks, name, stock in (("1 process", "1", 2.5), ("4 ranks", "4", 2.0)):
        work = f"save, durable, {ranks}"
        yield Target(
            work, "of raw direct write", 0.9, _of(f"save-{name}", "direct_write", "shardkeep")
        )
        yield Target(work, "x stock", stock, _of(f"save-{name}", "stock", "shardkeep"))
    for ranks, name, stock in (("1 process", "1", 5.0), ("4 ranks", "4", 4.0)):
        work, load = f"load, cached, {ranks}", f"load-{name}"
        mapped = "of safetensors' mmap + copy"
        yield Target(work, f"{mapped}, unverified", 0.95, _of(load, "safetensors", "unverified"))
        yield Target(work, f"{mapped}, verified", 0.8, _of(load, "safetensors", "shardkeep"))
        yield Target(work, "x stock, verified", stock, _of(load, "stock", "shardkeep"))
    for ranks, name in (("1 process", "1"), ("4 ranks", "4")):
        limit = _of(f"cold-{name}", "direct_read", "shardkeep")
        yield Target(f"load, cold, {ranks}", "of raw direct read, verified", 0.85, limit)
    work, straight = (
        "rows to columns, 4 ranks, cached",
        "time over that without resharding",
    )
    for key, bound, how in (
        ("unverified", 1.8, "unverified"),
        ("shardkeep", 2.75, "verified"),
    ):
        figure = f"{straight}, {how}"
        yield Target(work, figure, bound, _of("reshard", key, "straight"), False)
    yield Target(work, "x stock, verified", 4.0, _of("reshard", "stock", "shardkeep"))
    work = "a quarter of a tensor's columns"
    yield Target(
        work, "bytes read over needed, unverified", 1.1, _read("unverified", "bytes_needed"), False
    )
    yield Target(
        work,
        "bytes read over needed blocks, verified",
        1.1,
        _read("shardkeep", "bytes_rounded"),
        False,
    )
    for ranks, name in (("1 process", "1"), ("4 ranks", "4")):
        work = f"background save, {ranks}: stall"
        yield Target(work, "of a warm memory copy", 0.9, _of(f"async-{name}", "copy", "shardkeep"))
        yield Target(work, "x stock", 3.0, _of(f"async-{name}", "stock", "shardkeep"))
    for count in (20_000, 100_000):
        for verb in ("save", "load"):
            value = _of(f"small-{count}-{verb}", "stock", "shardkeep")
            yield Target(f"{count:,} small tensors: {verb}", "x stock", 20.0, value)
    yield Target("checksums on saving", "of its processor time", 3.0, _checksums, False, " %")
    yield Target(
        "verification of a cached load",
        "on top of the unverified time",
        25.0,
        _more("load-1", "shardkeep", "unverified"),
        False,
        " %",
    )
    work = "p99 of a training step"
    yield Target(work, "x that without a save, full speed", 1.1, _steps("shardkeep"), False)
    yield Target(work, "x that without a save, low_priority", 1.03, _steps("low_priority"), False)


TARGETS = tuple(_targets())
