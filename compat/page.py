"""The results of the checks, as a table on the terminal and as `docs/compatibility.md`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compat.directions import TITLES
from compat.environments import parse
from compat.results import Result

Stored = Mapping[str, Any]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"
SHOWN = 20
"""The maximum number of differences that are printed; the stored results have all."""


def show(result: Result, console: Console) -> None:
    """Print the table of one release and its differences."""
    table = Table(title=f"torch {result.release}", title_justify="left")
    table.add_column("Direction")
    for title in ("cases", "leaves", "equal", "spread", "not in it", "left out"):
        table.add_column(title, justify="right")
    for one in result.directions:
        style = "red" if one.differences else ""
        figures = (one.cases, one.leaves, one.equal, one.spread, len(one.absent), len(one.left_out))
        table.add_row(TITLES[one.key], *(f"{n:,}" if n else "" for n in figures), style=style)
    console.print(table)
    for one in result.directions:
        for line in one.differences[:SHOWN]:
            console.print(f"[red]{one.key}[/red] ", end="")
            console.print(line, markup=False, highlight=False)
        if len(one.differences) > SHOWN:
            console.print(f"… and {len(one.differences) - SHOWN} more")
    console.print(f"[dim]{result.seconds:.0f} seconds[/dim]")


def write(results: Sequence[Stored], path: Path = PAGE) -> None:
    """Write the page from stored results."""
    path.write_text(text(results), encoding="utf-8")


def text(results: Sequence[Stored]) -> str:
    """Return the page. All of its figures are taken from the results."""
    dates = sorted({one["date"] for one in results})
    writers = sorted({one["writer"] for one in results})
    differing = sum(len(d["differences"]) for d in directions(results))
    parts = [
        "# Compatibility",
        f"Made by `make compat` on {' and '.join(dates)}, with Shardkeep on torch "
        f"{' and '.join(writers)}: {len(results)} releases, "
        f"{sum(d['leaves'] for d in directions(results)):,} leaves compared bit for bit, "
        f"**{differing} different**.",
        INTRODUCTION,
        "## A release reads what Shardkeep wrote",
        READS,
        figures(results, ("load", "dtensor", "sharded_tensor", "torch_save")),
        "## Shardkeep reads what a release wrote, and runs on it",
        WRITES,
        figures(results, ("open", "drop_in", "on_1", "on_2", "on_4")),
        "## What is not compared, and why",
        ABSENT,
        reasons(results),
        *([DIFFERENT, differences(results)] if differing else []),
        REPEAT,
    ]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """\
## How to read it

A *case* is one checkpoint. A *leaf* is a tensor or a value in it. "874 / 874 (61)" means that 874
of 874 compared leaves were loaded as they were saved, in 61 cases. Tensors are compared by dtype,
shape and every bit, values by type and value, containers by their keys and the types of these.
Before a load, every bit of the template's tensors is the inverse of the expected one.

Cases that need a dtype or a feature that a release lacks are not counted as compared; each is
listed below with the reason."""

READS = """\
Only the release reads, without Shardkeep: by its own `dcp.load` (`load_state_dict` before `load`
existed) in one process; into DTensors or ShardedTensors on two ranks; and by
`dcp_to_torch_save` where it exists. Shardkeep saved without any special option. The states: every
dtype in a checkpoint of its own; scalars and empty tensors; views, transposed, tied and oversized
storages; a model with AdamW and a scheduler; nested states with lists, tuples, mappings and lists
without tensors, empty containers, integer keys, names in unicode, with dots, slashes and `..`;
DTensors on meshes of one and two dimensions, FSDP2, HSDP, FSDP2 with tensor parallelism,
ShardedTensors, uneven hand-made boxes on two dimensions, tensors and objects that only some ranks
have, written by four ranks, real and simulated; checkpoints that replaced others.

Releases up to 2.3 do not return plain values at the top level to the caller; these are taken from
the planner. If a value beside tensors has a key that is not a string, stock torch loads it under
the text of the key (`"0"` next to `0`); such values are compared there. `dcp_to_torch_save` builds
containers from names, so keys are compared as text. The class of a mapping is that of its
template."""

WRITES = """\
The release writes the golden cases (`tests/golden/make.py`) with another seed for their values than
the archives in `tests/golden`. They are read by `shardkeep.open`, as numpy arrays and values, with
all checksums, and by `shardkeep.dcp.load`. From 2.4 on, Shardkeep itself runs on the release: it
saves the states on 1 and on 4 ranks, and loads them on 1, on 2 and on 4 ranks in other placements
(uneven, empty, replicated, on meshes of one and two dimensions, strided shards of FSDP2 with
tensor parallelism)."""

ABSENT = """\
Some dtypes exist in a release by name only: their tensors can be neither copied nor saved there. A
checkpoint is left out only if the release can't create a tensor of the dtype, or fails both on the
checkpoint and on saving such a tensor itself. (In 2.4 and 2.5 these are `uint16` to `uint64`, whose
names the restricted unpickler of these releases does not know.) `tests/golden/README.md` lists what
a release could not write itself."""

DIFFERENT = "## Differences"

REPEAT = """\
## Repeat it

```console
$ make compat TORCH=2.3.1     # one release, in an environment that is removed afterwards
$ make compat                 # all of them, one after the other, and this page
$ COMPAT_KEEP=DIR make compat   # keeps the environments, about 1 GB each, for next time
```

This needs `python3.11`, for which every release has a wheel, and a package index. A release takes
about a minute once its environment exists. The exit code is 1 if anything differs.
`compat/results/` holds the figures of the last run with every reason and every difference."""

HEADS = {
    "load": "1 process",
    "dtensor": "2 ranks, DTensor",
    "sharded_tensor": "2 ranks, ShardedTensor",
    "torch_save": "`dcp_to_torch_save`",
    "open": "`shardkeep.open`",
    "drop_in": "`shardkeep.dcp.load`",
    "on_1": "on it: load on 1",
    "on_2": "load on 2",
    "on_4": "load on 4",
}


def directions(results: Sequence[Stored]) -> list[Stored]:
    return [one for result in results for one in result["directions"].values()]


def figures(results: Sequence[Stored], keys: Sequence[str]) -> str:
    """Return a table with a row for each release and a column for each direction."""
    lines = [
        "| torch | " + " | ".join(HEADS[key] for key in keys) + " |",
        "|---|" + "---|" * len(keys),
    ]
    for result in results:
        cells = [cell(result["directions"].get(key)) for key in keys]
        lines.append(f"| {result['release']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(direction: Stored | None) -> str:
    if direction is None:
        return "–"
    shown = f"{direction['equal']:,} / {direction['leaves']:,} ({direction['cases']})"
    return f"**{shown}**" if direction["differences"] else shown


def reasons(results: Sequence[Stored]) -> str:
    """Return a table of the omissions, with reasons and releases."""
    releases_of: dict[tuple[str, str, str], set[str]] = {}
    for result in results:
        for key, direction in result["directions"].items():
            entries = [line.split(": ", 1) for line in direction["left_out"]]
            if key not in ("open", "drop_in"):
                entries += list(direction["absent"].items())
            for case, why in entries:
                what = (GROUPS[key], *reason(case, why))
                releases_of.setdefault(what, set()).add(result["release"])
    together: dict[tuple[str, str, str], list[str]] = {}
    for (group, why, what), releases in sorted(releases_of.items()):
        together.setdefault((group, why, spans(releases, results)), []).append(what)
    lines = ["| Direction | Why | What | torch |", "|---|---|---|---|"]
    for (group, why, span), whats in together.items():
        shown = ", ".join(f"`{what}`" for what in whats)
        lines.append(f"| {group} | {escaped(why)} | {shown} | {span} |")
    return "\n".join(lines)


def reason(case: str, why: str) -> tuple[str, str]:
    """Return the reason of an omission, and its subject: a dtype, an object or a case."""
    why = why.removeprefix("NotInThisReleaseError: ")
    if trust := re.fullmatch(r"(\S+) needs trust \((.*)\)", why):
        return f"needs trust: {trust[2]}", f"{case}: {trust[1]}"
    if dtype := re.fullmatch(r"(?:\S+: )?(no )?torch\.(\w+) ?(.*)", why):
        return "no such dtype" if dtype[1] else dtype[3], dtype[2]
    return why, case


GROUPS = {
    **dict.fromkeys(("load", "dtensor", "sharded_tensor"), "it loads"),
    "torch_save": "`dcp_to_torch_save`",
    "open": "`shardkeep.open`",
    "drop_in": "`shardkeep.dcp.load`",
    **dict.fromkeys(("on_1", "on_2", "on_4"), "Shardkeep on it"),
}


def escaped(reason: str) -> str:
    return reason.replace("|", "\\|").replace("<", "&lt;")


def spans(releases: Iterable[str], results: Sequence[Stored]) -> str:
    """Return releases as text, with successive ones as a range: "2.0 to 2.3, 2.9"."""
    everyone = [one["release"] for one in results]
    rows = sorted(everyone.index(release) for release in releases)
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][-1] == row - 1:
            runs[-1].append(row)
        else:
            runs.append([row])
    if len(rows) == len(everyone) and len(everyone) > 1:
        return "all"
    short = [".".join(map(str, parse(release)[:2])) for release in everyone]
    return ", ".join(
        short[run[0]] if len(run) == 1 else f"{short[run[0]]} to {short[run[-1]]}" for run in runs
    )


def differences(results: Sequence[Stored]) -> str:
    return "\n".join(
        f"- {result['release']}, {HEADS[key]}: `{line}`"
        for result in results
        for key, direction in result["directions"].items()
        for line in direction["differences"][:SHOWN]
    )
