"""One moment: four ranks save, a kill, and the check of what remains."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree

import shardkeep as sk
from crash import rank
from crash.notes import PHASES, Notes, Outcome
from crash.plans import Plan
from crash.state import RANKS, differences, template

__all__ = ["Result", "attempt", "settle", "spans_of"]

_SOON = 10.0
"""Seconds within which the remaining ranks must have raised `RankFailed`."""
_STEP = re.compile(r"step_([1-9][0-9]*)")
_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Result:
    """The result of one moment.

    Attributes:
        seed, number, mode, whom: those of the plan.
        fell: the phase in which the rank of the plan was killed.
        acknowledged: the last step that a rank knew to be durable; 0 for none.
        newest: the newest committed step; 0 for none.
        detected: seconds until all other ranks had ended; None where all were killed.
        wrong: the checks that failed.
    """

    seed: int
    number: int
    mode: str
    whom: str
    fell: str
    acknowledged: int
    newest: int
    detected: float | None
    wrong: list[str]

    def line(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def of(line: str) -> Result:
        return Result(**json.loads(line))


def spans_of(mode: str, root: Path, notes: Notes) -> dict[tuple[str, str], float]:
    """Return how long each phase takes when no rank is killed."""
    plan = Plan(0, -1, mode, root / f"{mode}_whole", "none", 0, 0, None, 0.0)
    plan.folder.mkdir()
    pids = _begin(plan, notes, 1)
    _wait(pids, 60.0)
    spans = json.loads((plan.folder / rank.SPANS).read_text())
    rmtree(plan.folder)
    return {(mode, phase): seconds for phase, seconds in spans.items()}


def attempt(plan: Plan, notes: Notes) -> Result | None:
    """Kill and check. Return None if the job had ended or failed before the kill."""
    plan.folder.mkdir(exist_ok=True)
    before, _ = _newest(plan)
    pids = _begin(plan, notes, before + 1)
    ended = _wait(pids[plan.rank : plan.rank + 1], 60.0)
    died = time.monotonic()
    rest = [pid for pid in pids if pid not in ended]
    ended |= _wait(rest, _SOON)
    detected = time.monotonic() - died if plan.whom == "one" else None
    outcomes = [Outcome(value) for value in notes.every("outcome")]
    killed = [os.WIFSIGNALED(status) and os.WTERMSIG(status) == 9 for status in ended.values()]
    if not killed or outcomes[plan.rank] is not Outcome.NONE:
        _kill([pid for pid in pids if pid not in ended])
        return None
    wrong = [f"rank {r} {what}" for r, what in _bad(plan, pids, ended, outcomes)]
    _kill([pid for pid in pids if pid not in ended])
    done, begun = max(before, *notes.every("done")), max(before, *notes.every("begun"))
    newest, problems = _newest(plan)
    wrong += problems
    if not done <= newest <= begun:
        wrong.append(
            f"the newest step is {newest}, but {done} was durable and {begun} was the last begun"
        )
    if plan.mode != "manager":
        _keep_only(plan, newest)
    fell = PHASES[notes.get(plan.rank, "phase")]
    of = plan.seed, plan.number, plan.mode, plan.whom
    return Result(*of, fell, done, newest, detected, wrong)


def _begin(plan: Plan, notes: Notes, first: int) -> list[int]:
    """Start the processes of the ranks in a process group of their own."""
    notes.clear()
    pids: list[int] = []
    for number in range(RANKS):
        pid = os.fork()
        if not pid:
            with suppress(OSError):
                os.setpgid(0, pids[0] if pids else 0)
            rank.run(number, plan, notes, first)
        with suppress(OSError):  # the process has already done so itself
            os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    return pids


def _wait(pids: list[int], seconds: float) -> dict[int, int]:
    """Wait for processes to end, up to that many seconds; return the status of each that did."""
    ended: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(ended) < len(pids) and time.monotonic() < end:
        for pid in pids:
            if pid not in ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended[pid] = status
        time.sleep(0.002)
    return ended


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _bad(
    plan: Plan, pids: list[int], ended: dict[int, int], outcomes: list[Outcome]
) -> Iterator[tuple[int, str]]:
    """Yield the remaining ranks that did not raise `RankFailed`, and how they ended."""
    if plan.whom == "all":
        return
    for number, pid in enumerate(pids):
        if number == plan.rank:
            continue
        if pid not in ended:
            yield number, f"did not end within {_SOON:g} s"
        elif outcomes[number] not in (Outcome.RANK_FAILED, Outcome.FINISHED):
            yield number, "raised another error than RankFailed"


def _folders(plan: Plan) -> list[tuple[int, Path]]:
    """Return steps and their folders, the newest first."""
    found = [(int(m[1]), one) for one in plan.folder.iterdir() if (m := _STEP.fullmatch(one.name))]
    return sorted(found, reverse=True)


def _newest(plan: Plan) -> tuple[int, list[str]]:
    """Return the newest committed step, 0 for none, and the checks that it fails."""
    paths = [plan.folder / "last"] if plan.mode == "overwrite" else [p for _, p in _folders(plan)]
    for path in paths:
        try:
            checkpoint = sk.open(path)
        except sk.NotACheckpoint:
            continue
        except sk.ShardkeepError as error:
            return 0, [f"{path.name} cannot be opened: {error}"]
        step = checkpoint.read("step")
        report = checkpoint.verify()
        wrong = [str(one) for one in report.damaged] + [f"{n}: unchecked" for n in report.unchecked]
        if not wrong:
            loaded = template()
            sk.load(loaded, path)
            wrong = [f"{name} differs from what was saved" for name in differences(loaded, step)]
        if plan.mode != "overwrite" and path.name != f"step_{step}":
            wrong.append(f"step {step} is in {path.name}")
        return step, wrong
    return 0, []


def settle(mode: str, root: Path, notes: Notes) -> list[str]:
    """Run a job without a kill, which removes all leftovers; return the checks that fail."""
    plan = Plan(0, -1, mode, root / mode, "none", 0, 0, None, 0.0)
    plan.folder.mkdir(exist_ok=True)
    before, _ = _newest(plan)
    pids = _begin(plan, notes, before + 1)
    ended = _wait(pids, 60.0)
    _kill([pid for pid in pids if pid not in ended])
    newest, wrong = _newest(plan)
    if newest != before + rank.SAVES:
        wrong.append(
            f"after a job without a kill, the newest step is {newest}, not {before + rank.SAVES}"
        )
    return [f"{mode}: {what}" for what in wrong + _left_over(plan, newest)]


def _left_over(plan: Plan, newest: int) -> list[str]:
    """Return the leftovers of earlier saves that the last ones should have removed."""
    if plan.mode == "overwrite":
        folder = plan.folder / "last"
        ids = {m[0] for one in folder.iterdir() if (m := _ID.search(one.name))}
        return [f"there are files of {len(ids)} saves"] if len(ids) != 1 else []
    if plan.mode == "manager":
        steps = [step for step, _ in _folders(plan)]
        kept = [newest - n for n in range(rank.KEPT)]
        return [f"there are steps {steps}, not {kept}"] if steps != kept else []
    return []


def _keep_only(plan: Plan, newest: int) -> None:
    """Remove all older steps, which are small but many."""
    for step, path in _folders(plan):
        if step != newest:
            rmtree(path)
