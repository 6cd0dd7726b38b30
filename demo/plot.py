"""Draws the loss before and after the kill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

__all__ = ["draw"]

Curve = Mapping[int, float]

BEFORE, AFTER, REFERENCE, KILL = "#2a5d9f", "#d9731a", "#9a9a9a", "#c0202a"

_GOES_ON = {"color": REFERENCE, "linewidth": 5, "alpha": 0.45}
_LOST = {"color": BEFORE, "linestyle": "none", "marker": "x", "markersize": 5}
_SAVED = {
    "color": BEFORE,
    "linestyle": "none",
    "marker": "o",
    "markersize": 7,
    "markeredgecolor": "white",
}
_RING = {"marker": "o", "color": "none", "markersize": 14, "markeredgecolor": AFTER}


def draw(
    path: Path,
    *,
    first: Curve,
    second: Curve,
    reference: Curve,
    saves: Sequence[int],
    ranks: tuple[int, int],
) -> None:
    """Draw the killed run, the resumed one and the uninterrupted one.

    Args:
        path: the PNG file to write.
        first, second, reference: loss by step; `reference` starts where `second` does.
        saves: the steps that `first` saved at; the last one is where `second` starts.
        ranks: the numbers of ranks of `first` and `second`.
    """
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure = plt.figure(figsize=(12, 5.6), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        grid = figure.add_gridspec(2, 2, width_ratios=(3, 2), height_ratios=(3, 1))
        whole, near = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[0, 1])
        apart = figure.add_subplot(grid[1, 1], sharex=near)
        last, killed = saves[-1], max(first) + 0.5
        for axes in (whole, near):
            _losses(axes, first, second, reference, saves, ranks)
        _differences(apart, first, second, reference)
        for axes in (whole, near, apart):
            axes.axvline(killed, color=KILL, linewidth=1.4, label=f"SIGKILL, all {ranks[0]} ranks")
            axes.grid(color="#e8e8e8", linewidth=0.8)
            axes.set_axisbelow(True)
        whole.set(xlim=(0, max(second) + 1), ylim=(None, 0.1 + max(first.values())))
        near.set_xlim(max(1, last - 8), min(max(second), max(first) + 14))
        _fit(near, first, second, reference)
        whole.set(xlabel="step", ylabel="training loss (nats per byte)")
        apart.set(xlabel="step", ylabel="difference")
        near.tick_params(labelbottom=False)
        whole.set_title("The whole run", loc="left", fontsize=10)
        near.set_title(
            "Around the kill (below: minus the uninterrupted run)", loc="left", fontsize=10
        )
        figure.suptitle(
            f"Killed on {ranks[0]} ranks, resumed on {ranks[1]} from the last committed checkpoint",
            fontsize=13,
            fontweight="bold",
        )
        handles, labels = whole.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _losses(
    axes: Axes,
    first: Curve,
    second: Curve,
    reference: Curve,
    saves: Sequence[int],
    ranks: tuple[int, int],
) -> None:
    before, after = f"{ranks[0]} ranks", f"{ranks[1]} ranks"
    start = {saves[-1]: first[saves[-1]]}
    kept = {step: loss for step, loss in first.items() if step <= saves[-1]}
    axes.plot(*_xy(start | dict(reference)), **_GOES_ON, label=f"{before}, uninterrupted")
    axes.plot(*_xy(kept), color=BEFORE, linewidth=1.6, label=f"{before}, until the kill")
    axes.plot(*_xy(start | dict(second)), color=AFTER, linewidth=1.6, label=f"{after}, resumed")
    axes.plot(*_xy(_lost(first, saves)), **_LOST, label=f"{before}, steps lost in the kill")
    axes.plot(
        saves, [first[step] for step in saves], **_SAVED, label="checkpoints, last one ringed"
    )
    axes.plot(*_xy(start), **_RING)


def _differences(axes: Axes, first: Curve, second: Curve, reference: Curve) -> None:
    """Draw the differences of the lost steps and the resumed run from the uninterrupted run."""
    axes.axhline(0, color=REFERENCE, linewidth=4, alpha=0.45)
    for curve, look in ((second, {"color": AFTER, "linewidth": 1.6}), (first, _LOST)):
        common = curve.keys() & reference.keys()
        axes.plot(*_xy({step: curve[step] - reference[step] for step in common}), **look)


def _fit(axes: Axes, *curves: Curve) -> None:
    """Fit the height to the visible part of the curves."""
    left, right = axes.get_xlim()
    seen = [loss for curve in curves for step, loss in curve.items() if left <= step <= right]
    margin = 0.08 * (max(seen) - min(seen))
    axes.set_ylim(min(seen) - margin, max(seen) + margin)


def _lost(first: Curve, saves: Sequence[int]) -> Curve:
    return {step: loss for step, loss in first.items() if step > saves[-1]}


def _xy(curve: Curve) -> tuple[list[int], list[float]]:
    steps = sorted(curve)
    return steps, [curve[step] for step in steps]
