"""Writes the figures into docs/reliability.md."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import torch

from crash.notes import PHASES
from crash.plans import KNOBS, MODES
from crash.state import RANKS
from crash.trial import Result

__all__ = ["BEGIN", "END", "summary", "write"]

BEGIN, END = "<!-- crash runs: begin -->", "<!-- crash runs: end -->"


def summary(results: Sequence[Result]) -> str:
    """Return all results as Markdown tables."""
    return "\n".join([*_head(results), "", *_modes(results), "", *_phases(results)])


def write(page: Path, text: str) -> None:
    """Replace the text between the markers of a page."""
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def _head(results: Sequence[Result]) -> Iterator[str]:
    wrong = [one for one in results if one.wrong]
    seeds = ", ".join(map(str, sorted({one.seed for one in results})))
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.release().partition('-')[0]}"
    yield (
        f"**{len(results):,} moments, {len(wrong)} failures** ({date.today().isoformat()}, seed "
        f"{seeds}, {RANKS} ranks, {machine}, Python {platform.python_version()}, torch "
        f"{torch.__version__})."
    )
    detected = sorted(one.detected for one in results if one.detected is not None)
    if detected:
        median = detected[len(detected) // 2]
        yield (
            f"Where one rank was killed, all others had raised `RankFailed` after {median:.1f} s "
            f"(median; {detected[-1]:.1f} s at most)."
        )
    yield (
        f"The heartbeat was {KNOBS['SHARDKEEP_HEARTBEAT_SECONDS']} s and the deadline "
        f"{KNOBS['SHARDKEEP_DEADLINE_SECONDS']} s. The defaults are 1.5 s and 1,800 s. The "
        "deadline applies to a rank that dies between two saves, when it sends no heartbeat."
    )
    in_between = sum(one.newest > one.acknowledged for one in results)
    yield (
        f"In {in_between} cases the step was committed, but no rank knew yet that it was durable."
    )
    for one in wrong:
        where = f"moment {one.number} of seed {one.seed} ({one.mode}, {one.whom}, {one.fell})"
        yield f"- {where}: {'; '.join(one.wrong)}"


def _modes(results: Sequence[Result]) -> Iterator[str]:
    yield "| Save | Moments | One rank killed | All killed | Failures |"
    yield "|---|---|---|---|---|"
    for mode in MODES:
        some = [one for one in results if one.mode == mode]
        whom = Counter(one.whom for one in some)
        wrong = sum(bool(one.wrong) for one in some)
        yield f"| {mode} | {len(some)} | {whom['one']} | {whom['all']} | {wrong} |"


def _phases(results: Sequence[Result]) -> Iterator[str]:
    yield "| Killed in phase | " + " | ".join(MODES) + " | Failures |"
    yield "|---" * (len(MODES) + 2) + "|"
    for phase in PHASES:
        some = [one for one in results if one.fell == phase]
        if some:
            count = Counter(one.mode for one in some)
            cells = " | ".join(str(count[mode]) for mode in MODES)
            yield f"| {phase} | {cells} | {sum(bool(one.wrong) for one in some)} |"
