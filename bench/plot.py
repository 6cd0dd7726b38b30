"""Draws the speed of each contestant per workload, with the limit of the machine."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from bench.measure import Result, Series
from bench.page import ordered

__all__ = ["draw"]

COLORS = {
    "shardkeep": "#2a5d9f",
    "unverified": "#8db4e2",
    "stock": "#d9731a",
}
OTHER, LIMIT = "#b9b9b9", "#c0202a"
NAMES = {
    "shardkeep": "Shardkeep",
    "unverified": "Shardkeep,\nunverified",
    "stock": "stock DCP",
    "torch": "torch.save",
    "safetensors": "safetensors",
    "torchsnapshot": "torchsnapshot",
    "torch_checkpointing": "torch_check-\npointing",
}
WORKS = ("save", "load", "stall")
COLUMNS = 4


def draw(results: Mapping[str, Result], path: Path) -> None:
    """Draw bars of the median GB/s (tensors per second for small ones) with the spread."""
    shown = [result for result in ordered(results) if _drawn(result)]
    loops = [result for result in results.values() if result.work == "step" and _bars(result)]
    if not shown:
        return
    count = len(shown) + len(loops)
    rows = -(-count // COLUMNS)
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, grid = plt.subplots(
            rows, COLUMNS, figsize=(16, 3.1 * rows + 0.6), layout="constrained", squeeze=False
        )
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        for axes, result in zip(grid.flat, shown, strict=False):
            _panel(axes, result)
        for axes, result in zip(grid.flat[len(shown) :], loops, strict=False):
            _steps(axes, result)
        for axes in grid.flat[count:]:
            axes.set_visible(False)
        figure.suptitle(
            "Longer is faster, but for the last. Red: what the machine itself can do. "
            "Thin lines: all rounds. " + _when_and_where(results),
            fontsize=12,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
        plt.close(figure)


def _when_and_where(results: Mapping[str, Result]) -> str:
    dates = sorted({result.date for result in results.values()})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    machine = next(iter(results.values())).machine
    return f"{machine.get('processor', 'unknown processor')}, {span}."


def _drawn(result: Result) -> bool:
    return result.work in WORKS and result.name != "checksums" and bool(_bars(result))


def _bars(result: Result) -> dict[str, Series]:
    return {
        key: series
        for key, series in result.series.items()
        if series.times and series.role != "limit"
    }


def _panel(axes: Axes, result: Result) -> None:
    bars = _bars(result)
    small = result.group == "small"
    amount = result.items if small else result.nbytes / 1e9
    for row, (key, series) in enumerate(bars.items()):
        rates = [amount / seconds for seconds in series.times]
        middle = amount / statistics.median(series.times)
        axes.barh(row, middle, color=COLORS.get(key, OTHER), height=0.72)
        axes.plot([min(rates), max(rates)], [row, row], color="#333333", linewidth=1.2)
        label = f"{middle:,.0f}" if small else f"{middle:.2f}"
        axes.annotate(
            label,
            (max(*rates, middle), row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            zorder=5,  # not crossed by the limit
        )
    axes.set_yticks(range(len(bars)), [NAMES.get(key, key) for key in bars])
    axes.invert_yaxis()
    axes.set_xlabel("tensors/s" if small else "GB/s", fontsize=8)
    _limit(axes, result, amount)
    axes.set_title(_title(result), loc="left", fontsize=9, fontweight="bold")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axes.grid(axis="x", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)


def _steps(axes: Axes, result: Result) -> None:
    """Draw the 99th percentile of the steps of a training loop, by what runs beside it."""
    series = [one for one in result.series.values() if one.figures.get("p99")]
    for row, one in enumerate(series):
        value = 1000 * one.figures["p99"][0]
        color = {"ours": COLORS["shardkeep"], "stock": COLORS["stock"]}.get(one.role, OTHER)
        axes.barh(row, value, color=color, height=0.72)
        axes.annotate(
            f"{value:.2f}",
            (value, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(series)), [textwrap.fill(one.label, 18) for one in series])
    axes.tick_params(axis="y", labelsize=7.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * axes.dataLim.x1)
    axes.set_xlabel("ms, 99th percentile", fontsize=8)
    axes.set_title(
        "A step of a loop beside a save\n(shorter is better)\n",
        loc="left",
        fontsize=9,
        fontweight="bold",
    )
    axes.grid(axis="x", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)


def _limit(axes: Axes, result: Result, amount: float) -> None:
    """Draw the limit of the machine as a line, and leave room for the longest number."""
    rates = [amount / seconds for series in _bars(result).values() for seconds in series.times]
    series = result.series.get(result.limit)
    limit = amount / series.median if series is not None and series.median else 0.0
    axes.set_xlim(0, max(1.18 * max(rates), 1.05 * limit))
    axes.locator_params(axis="x", nbins=4)  # large numbers would run into each other
    if series is None or not limit:
        return
    axes.axvline(limit, color=LIMIT, linewidth=1.8, linestyle="--", zorder=3)
    right = limit > axes.get_xlim()[1] / 2
    axes.annotate(
        f"{series.label.partition(', ')[0]} {limit:.2f}",
        (limit, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 1),
        textcoords="offset points",
        ha="right" if right else "left",
        va="bottom",
        color=LIMIT,
        fontsize=7.5,
    )


def _title(result: Result) -> str:
    """Return a title of two lines at most, with room below for the name of the limit."""
    head, comma, rest = result.title.partition(", ")
    return f"{head}{comma}\n{rest}\n" if rest else f"{head}\n"
