"""Writes `docs/performance.md` from the stored results."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.measure import Result, Series, paired
from bench.targets import TARGETS, Target, times
from bench.workloads import WORKLOADS

__all__ = ["PICTURE", "ordered", "text", "write"]

PICTURE = "performance.png"

INTRODUCTION = """\
# Performance

`make bench` writes this page from the last results of each workload in
[bench/results/](../bench/results/). All rows of a table were measured in one run: each contestant
runs once per round, in another order each round. Times on one machine drift from run to run, so
ratios are taken within a round, and their median is shown. No figure on this page fails a build.
"""

METHOD = """\
## How it is measured

- **Contestants** run with their best settings: the settings in the tables were the fastest of those
  tried before the rounds. `threads` is the number of threads that write or read, `copying` the
  number with which torch copies. Stock DCP is `torch.distributed.checkpoint`; the files that it
  reads were written by one thread.
- **A save is durable** when it returns, for every contestant: files and folder are synced within
  the timed part. The bench syncs for contestants that do not (`torch.save`, safetensors,
  torchsnapshot, torch_checkpointing). Old files are deleted outside of the timed part.
- **A load** fills tensors whose memory was touched before. The first load of each contestant fills
  cleared tensors, and every element is compared with what was saved.
- **Cached**: the files are read once, untimed, before each load. **Cold**: the page cache is
  emptied before each load.
- **The states**: *AdamW* is a transformer's bf16 parameters with fp32 master weights and both
  moments, in 240 tensors; *bf16* is the parameters alone, in 240 tensors. On several ranks every
  tensor is a DTensor, sharded by rows.
- **The limits** move the same number of bytes and do nothing else: `O_DIRECT` writes of the bytes
  of the state from aligned memory into a preallocated file, which is then truncated and synced;
  `preadv` from the page cache into the tensors; `O_DIRECT` reads of 2 or 8 MiB; torch's copy
  between existing tensors.
- **Time** is from the begin of the first rank to the end of the last one. **CPU** and **memory**
  are sums over all ranks. Memory is the peak of the resident memory beyond that before the call,
  with the pages of mapped files. Helper processes are not counted.
- **Read / needed** counts the bytes that read calls request from the kernel. Mapped files are not
  counted.
- **First** is the first call in its process, which allocates buffers and imports modules.

## Run it

```console
$ make bench                            # all workloads, more than an hour; writes this page
$ make bench QUICK=1                    # tiny sizes, 5 minutes, to check that everything works
$ .venv-bench/bin/python -m bench save-1 --rounds 9 --size 4
```

A single workload replaces its own results, and the page is written again from all results.
`python -m bench --list` lists the workloads.
"""


def write(results: Mapping[str, Result], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(results), encoding="utf-8")


def text(results: Mapping[str, Result]) -> str:
    parts = [
        INTRODUCTION,
        "\n".join(_machines(results)),
        f"![GB/s of each contestant, by workload]({PICTURE})",
        "## Targets\n\n" + "\n".join(_targets(results)),
        "## Where Shardkeep is not faster\n\n" + "\n".join(_slower(results)),
        *("\n".join(_table(result)) for result in ordered(results)),
        METHOD,
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def ordered(results: Mapping[str, Result]) -> list[Result]:
    """Return the results in the order in which they are run."""
    names = list(WORKLOADS)

    def place(result: Result) -> tuple[int, bool, str]:
        fitting = [row for row, name in enumerate(names) if result.name.startswith(name)]
        return (fitting[0] if fitting else len(names), result.work != "save", result.name)

    return sorted(results.values(), key=place)


def _machines(results: Mapping[str, Result]) -> Iterator[str]:
    """Yield the facts about the machine that all results share."""
    every = list(results.values())
    if not every:
        yield "There are no results yet."
        return
    dates = sorted({result.date for result in every})
    yield f"- date: {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "")
    for key in every[-1].machine:
        values = list(dict.fromkeys(result.machine.get(key, "unknown") for result in every))
        if key == "load before the run":
            shown = (
                f"{min(map(float, values))} to {max(map(float, values))} (mean of a minute, mostly"
            )
            shown += " the workload before)"
        else:
            shown = "; ".join(values)
        yield f"- {key}: {shown}"


def _targets(results: Mapping[str, Result]) -> Iterator[str]:
    known = [target.reached(results) for target in TARGETS]
    yield f"{known.count(True)} of {len(TARGETS)} reached, {known.count(None)} not measured."
    yield ""
    yield "| Work | Figure | Target | Measured | Reached |"
    yield "|---|---|---|---|---|"
    work = ""
    for target, reached in zip(TARGETS, known, strict=True):
        value = target.value(results)
        shown = "-" if value is None else _number(value) + target.unit
        word = {True: "yes", False: "**no**", None: "not measured"}[reached]
        first = "" if target.work == work else target.work
        work = target.work
        yield f"| {first} | {target.figure} | {_bound(target)} | {shown} | {word} |"


def _bound(target: Target) -> str:
    return f"{'≥' if target.least else '≤'} {target.bound:g}{target.unit}"


LEVEL = 0.03
"""Ratios closer to 1 than this count as level, as the machine drifts by more."""


def _slower(results: Mapping[str, Result]) -> Iterator[str]:
    """Yield a line for each contestant that is faster than Shardkeep in a workload."""
    found = [line for result in ordered(results) for line in _ahead(result)]
    yield from found or ["In none of the measured workloads."]


def _ahead(result: Result) -> Iterator[str]:
    """Yield the contestants that are faster than Shardkeep with verification, the default."""
    ours = "shardkeep"
    for key, series in result.series.items():
        if series.role not in ("stock", "other") or result.work in ("leak",) or key == "crc":
            continue
        ratio = times(result, ours, key)
        if ratio is None or ratio < 1 - LEVEL:
            continue
        loose = times(result, "unverified", key)
        more = "" if loose is None else f"; with `verify=False` {_compared(loose)}"
        if ratio <= 1 + LEVEL:
            yield f"- {result.title}: level with {series.label}{more}."
        else:
            yield f"- {result.title}: {series.label} is {_number(ratio)} × as fast{more}."
    for series in result.series.values():
        if series.role == "ours" and series.error:
            yield f"- {result.title}: {series.label} failed: `{_escaped(series.error)}`"


def _compared(ratio: float) -> str:
    """Return which of the two is faster, and by what ratio."""
    if abs(ratio - 1) <= LEVEL:
        return "level"
    ahead, how = ("that", ratio) if ratio > 1 else ("Shardkeep", 1 / ratio)
    return f"{ahead} is {_number(how)} × as fast"


def _table(result: Result) -> Iterator[str]:
    yield f"## {result.title}"
    yield ""
    if result.error:
        yield f"The workload failed: `{_escaped(result.error)}`"
        return
    if result.nbytes:
        rounds = max((len(series.seconds) for series in result.series.values()), default=0)
        tensors = f", {result.items:,} tensors" if result.items > 1 else ""
        yield f"{_size(result.nbytes)}{tensors}, {rounds} rounds, {result.date}."
        yield ""
    columns = _columns(result)
    yield "| | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for key, series in result.series.items():
        label = f"*{series.label}*" if series.role == "limit" else series.label
        if series.role == "ours":
            label = f"**{series.label}**"
        if not series.times:
            why = f"`{_escaped(series.error)}`" if series.error else "not measured"
            yield f"| {label} | {why} |" + " |" * (len(columns) - 1)
            continue
        yield f"| {label} | " + " | ".join(_row(result, key, columns)) + " |"
    for series in result.series.values():
        if series.settings and series.role != "ours" and series.settings not in series.label:
            yield from ("", f"{series.label}: {series.settings}.")
        if series.error and series.times:
            yield from ("", f"{series.label} stopped early: `{_escaped(series.error)}`")
    for note in result.notes:
        yield from ("", note)


def _columns(result: Result) -> list[str]:
    """Return the columns that apply to a workload."""
    if result.work == "leak":
        return ["bytes a save", "growth in the second half", "saves", "seconds a save"]
    if result.work == "step":
        return ["p50, ms", "p99, ms", "× p50 alone", "× p99 alone", "steps", "saves"]
    found = ["seconds", "min to max"]
    found.append("tensors/s" if result.group == "small" else "GB/s")
    if result.limit:
        found.append("of the limit")
    if any(series.role == "stock" for series in result.series.values()):
        found.append("× stock")
    if result.work == "stall":
        found.append("until durable")
    found += ["first", "CPU s", "peak MB"]
    if result.work == "load":
        found.append("read / needed")
    if result.name == "checksums":
        found.append("checksums' CPU s")
    return found


def _row(result: Result, key: str, columns: Sequence[str]) -> Iterator[str]:
    series, amount = result.series[key], result.items if result.group == "small" else result.nbytes
    scale = 1 if result.group == "small" else 1e9
    seconds = series.median or 0.0
    for column in columns:
        yield _cell(result, key, series, column, amount / scale, seconds)


def _cell(
    result: Result, key: str, series: Series, column: str, amount: float, seconds: float
) -> str:
    rounds = "" if len(series.times) == len(series.seconds) else f" ({len(series.times)} rounds)"
    match column:
        case "seconds":
            return f"{seconds:.3g}{rounds}"
        case "min to max":
            return f"{min(series.times):.3g} to {max(series.times):.3g}"
        case "GB/s":
            return _number(amount / seconds) if seconds else "-"
        case "tensors/s":
            return f"{amount / seconds:,.0f}" if seconds else "-"
        case "of the limit":
            return _ratio(result, result.limit, key)
        case "× stock":
            return _ratio(result, "stock", key)
        case "until durable":
            return "-" if series.role == "limit" else _median(series, "durable")
        case "first":
            return "-" if series.first is None else f"{series.first:.3g}"
        case "CPU s":
            return f"{statistics.median(series.cpu):.3g}" if series.cpu else "-"
        case "peak MB":
            return f"{max(series.first_peak, *series.peak) / 1e6:,.0f}" if series.peak else "-"
        case "read / needed":
            return _read_over_needed(result, series)
        case "checksums' CPU s":
            return _median(series, "crc")
        case _:
            return _special(result, series, column)


def _special(result: Result, series: Series, column: str) -> str:
    """Return a cell of the workloads that do not measure seconds per call."""
    figures = {name: values[-1] for name, values in series.figures.items()}
    alone = result.series.get("alone")
    match column:
        case "bytes a save":
            return f"{figures['slope']:,.0f}"
        case "growth in the second half":
            return f"{figures['grown'] / 1e6:.2f} MB"
        case "seconds a save":
            return f"{(series.median or 0.0) / figures['saves']:.2g}"
        case "saves":
            return f"{sum(series.figures['saves']):.0f}" if "saves" in series.figures else "-"
        case "steps":
            return f"{figures['steps']:.0f}"
        case "p50, ms" | "p99, ms":
            return f"{1000 * figures[column[:3]]:.2f}"
        case "× p50 alone" | "× p99 alone" if alone is not None and alone.figures:
            name = column[2:5]
            return f"{figures[name] / alone.figures[name][0]:.2f}"
    return "-"


def _read_over_needed(result: Result, series: Series) -> str:
    """Return bytes read over bytes needed: from Shardkeep's report, for others from the kernel."""
    if "bytes_read" in series.figures:
        read, needed = (series.figures[f"bytes_{word}"][-1] for word in ("read", "needed"))
    else:
        read, needed = statistics.median(series.read or [0]), result.nbytes
    if not needed:
        return "-"
    return "mapped" if read < needed / 10 else _number(read / needed)


def _ratio(result: Result, slow: str, fast: str) -> str:
    value = times(result, slow, fast)
    if value is None:
        return "-"
    found = paired(result.series[slow], result.series[fast])
    if slow == fast:
        return "1"
    return f"{_number(value)} ({_number(min(found))} to {_number(max(found))})"


def _median(series: Series, name: str) -> str:
    values = series.figures.get(name)
    return f"{statistics.median(values):.3g}" if values else "-"


def _number(value: float) -> str:
    """Format with two decimals below 10 and fewer above."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.3g} MB"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'")
