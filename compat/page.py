"""The results, as a table on the terminal and as `docs/compatibility.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compat.directions import TITLES
from compat.results import Result

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"
SHOWN = 20


def show(result: Result, console: Console) -> None:
    """The table of one release, and what differs."""
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


def write(results: Sequence[Mapping[str, Any]]) -> None:
    raise NotImplementedError
