"""One picture: the loss before the kill and after it."""

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


def draw(
    path: Path,
    *,
    first: Curve,
    second: Curve,
    reference: Curve,
    saves: Sequence[int],
    ranks: tuple[int, int],
) -> None:
    """Draw the killed run, the resumed one and the uninterrupted one: all of it, and the kill near.

    Args:
        path: the PNG.
        first, second, reference: loss by step.
        saves: the steps that `first` saved at; the last one is where `second` starts.
        ranks: of `first` and `second`.
    """
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (whole, near) = plt.subplots(
        1, 2, figsize=(12, 5), width_ratios=(3, 2), layout="constrained"
    )
    for axes in (whole, near):
        _curves(axes, first, second, reference, saves, ranks)
        axes.set_xlabel("step")
        axes.grid(color="#e8e8e8", linewidth=0.8)
        axes.set_axisbelow(True)
    whole.set_ylabel("training loss (nats per byte)")
    whole.set_xlim(0, max(second) + 1)
    whole.set_title("the whole run", loc="left", fontsize=10)
    around = _near(near, first, second, reference, saves[-1])
    near.set_title(f"steps {around[0]} to {around[1]}", loc="left", fontsize=10)
    figure.suptitle(
        f"Killed on {ranks[0]} ranks, resumed on {ranks[1]} from the last committed checkpoint",
        fontsize=13,
        fontweight="bold",
    )
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curves(
    axes: Axes,
    first: Curve,
    second: Curve,
    reference: Curve,
    saves: Sequence[int],
    ranks: tuple[int, int],
) -> None:
    last, killed = saves[-1], max(first) + 0.5
    kept = {step: loss for step, loss in first.items() if step <= last}
    lost = {step: loss for step, loss in first.items() if step >= last}
    on = {last: first[last], **second}
    axes.plot(
        *_xy({last: first[last], **reference}),
        color=REFERENCE,
        linewidth=4,
        alpha=0.45,
        label=f"{ranks[0]} ranks, uninterrupted",
    )
    axes.plot(*_xy(kept), color=BEFORE, linewidth=1.6, label=f"{ranks[0]} ranks")
    axes.plot(
        *_xy(lost),
        color=BEFORE,
        linewidth=1.4,
        linestyle=(0, (2, 1.2)),
        label=f"{ranks[0]} ranks, lost in the kill",
    )
    axes.plot(*_xy(on), color=AFTER, linewidth=1.6, label=f"{ranks[1]} ranks, resumed")
    axes.plot(
        saves,
        [first[step] for step in saves],
        "o",
        color=BEFORE,
        markersize=6,
        markeredgecolor="white",
        label="checkpoints; the last one is ringed",
    )
    axes.plot(
        [last],
        [first[last]],
        "o",
        color="none",
        markersize=13,
        markeredgecolor=AFTER,
        markeredgewidth=1.8,
    )
    axes.axvline(killed, color=KILL, linewidth=1.4, label=f"SIGKILL, all {ranks[0]} ranks")


def _near(axes: Axes, first: Curve, second: Curve, reference: Curve, last: int) -> tuple[int, int]:
    """Show only the surroundings of the kill."""
    left, right = max(1, last - 12), min(max(second), max(first) + 14)
    seen = [
        loss
        for curve in (first, second, reference)
        for step, loss in curve.items()
        if left <= step <= right
    ]
    margin = 0.08 * (max(seen) - min(seen))
    axes.set_xlim(left, right)
    axes.set_ylim(min(seen) - margin, max(seen) + margin)
    return left, right


def _xy(curve: Curve) -> tuple[list[int], list[float]]:
    steps = sorted(curve)
    return steps, [curve[step] for step in steps]
