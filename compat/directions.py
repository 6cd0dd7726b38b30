"""The directions from a writer to a reader, and what each of them compares."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from compat import comparison
from compat.environments import Environment, parse
from compat.launcher import RanksFailedError, run_ranks
from compat.read_golden import loaded, opened, read_all
from compat.results import Direction, Outcome

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SRC = {"PYTHONPATH": str(ROOT / "src")}

NOT_THERE = ("NotInThisReleaseError", "ImportError", "AttributeError", "ModuleNotFoundError")
REFUSED = "cut a dimension twice"
"""A documented limit: before 2.5, a DTensor does not record how two mesh dimensions cut one of its
dimensions.
"""

FIRST_TO_RUN_ON = (2, 4)
"""The oldest torch that Shardkeep itself runs on."""

TITLES = {
    "load": "loads what Shardkeep wrote",
    "dtensor": "… into DTensors on 2 ranks",
    "sharded_tensor": "… into ShardedTensors on 2 ranks",
    "torch_save": "… by dcp_to_torch_save",
    "open": "Shardkeep opens what it wrote",
    "drop_in": "… by shardkeep.dcp.load",
    "on_1": "Shardkeep on it: save on 1 and 4 ranks, load on 1",
    "on_2": "… load on 2",
    "on_4": "… load on 4",
}


@dataclass(frozen=True)
class Job:
    """The check of one release."""

    environment: Environment
    scratch: Path
    written: Path
    """The folder of what Shardkeep wrote in the development environment."""
    not_saved: Mapping[str, str]
    """Case -> why Shardkeep could not write it there."""
    seed: int

    @property
    def minor(self) -> tuple[int, int]:
        return parse(self.environment.release)[:2]


def write_states(out: Path, seed: int, python: Path | str = sys.executable) -> dict[str, str]:
    """Save all states with Shardkeep; return the reasons for those that it cannot create here."""
    reasons: dict[str, str] = {}
    for ranks in (1, 4):
        arguments = [out, "--seed", str(seed)]
        run_ranks(python, HERE / "states.py", arguments, size=ranks, variables=SRC)
        outcomes = json.loads((out / f"written_by_{ranks}.json").read_text(encoding="utf-8"))
        reasons |= {name: one["why"] for name, one in outcomes.items() if not one["ok"]}
    return reasons


def torch_reads(job: Job) -> Iterator[Direction]:
    """Compare what the release reads from Shardkeep's checkpoints."""
    python, script = job.environment.python, HERE / "read_with_torch.py"
    out = job.scratch / "read_by_torch"
    # Releases before 2.3 have no converter.
    convert = ["--torch-save"] if job.minor >= (2, 3) else []
    try:
        run_ranks(python, script, [job.written, out, *convert])
    except RanksFailedError as error:
        yield failed("load", error)
        return
    judged = judge("load", out / "load", job.written)
    missing = not_written(job.not_saved, "not written in the development environment: ")
    yield Direction("load", (*judged.outcomes, *missing))
    if convert:
        yield judge("torch_save", out / "torch_save", job.written, text_keys=True)
    spread = ["dtensor", "sharded_tensor"][0 if job.minor >= (2, 1) else 1 :]
    names = [path.name for path in cases(job.written) if spreads(path.name)]
    try:
        run_ranks(
            python, script, [job.written, out, "--spread", *spread, "--cases", *names], size=2
        )
    except RanksFailedError as error:
        yield failed(spread[0], error)
        return
    for kind in spread:
        yield judge(kind, out / kind, job.written, names=names)


def spreads(name: str) -> bool:
    """Return whether the tensors of a case can be sharded, and sharding is not what it tests."""
    return not name.startswith(("dtype", "more_dtypes", "no_flatten", "objects", "empty"))


def failed(key: str, error: BaseException) -> Direction:
    """Return a direction that could not be completed, which counts as a difference."""
    return Direction(key, (Outcome("all", 1, (f": {type(error).__name__}: {error}",)),))


def cases(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/expected.json"))


def judge(
    key: str,
    answers: Path,
    checkpoints: Path,
    *,
    names: list[str] | None = None,
    text_keys: bool = False,
) -> Direction:
    """Compare a reader's answers with what was saved."""
    wanted = names or [path.name for path in cases(checkpoints)]
    extra = [path.stem for path in sorted(answers.glob("*.json")) if path.stem not in wanted]
    return Direction(
        key,
        tuple(judge_case(name, answers / f"{name}.json", text_keys) for name in wanted + extra),
    )


def judge_case(name: str, answer: Path, text_keys: bool = False) -> Outcome:
    """Compare one answer; the reader lists what it left out because the release cannot hold it."""
    if not answer.exists():
        return Outcome(name, 1, (": no answer",))
    content = json.loads(answer.read_text(encoding="utf-8"))
    if "absent" in content:
        return Outcome(name, absent=content["absent"])
    left_out = tuple(content.get("left_out", ()))
    if "why" in content:
        return Outcome(name, comparison.leaves(content["expected"]), (f": {content['why']}",))
    done = comparison.compare(content["expected"], content["state"], text_keys=text_keys)
    return Outcome(
        name,
        done.leaves,
        tuple(map(str, done.differences)),
        left_out=left_out,
        spread=content.get("spread", 0),
    )


def shardkeep_reads(job: Job) -> Iterator[Direction]:
    """Compare what Shardkeep reads from the release's checkpoints."""
    golden = job.scratch / "golden"
    script = ROOT / "tests" / "golden" / "make.py"
    try:
        job.environment.run(script, golden, "--seed", str(job.seed), timeout=900)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        yield failed("open", error)
        return
    yield Direction("open", read_all(golden, opened))
    yield Direction("drop_in", read_all(golden, loaded))


def shardkeep_runs(job: Job) -> Iterator[Direction]:
    """Run Shardkeep on the release: save, and load on other numbers of ranks."""
    if job.minor < FIRST_TO_RUN_ON:
        return
    python, written = job.environment.python, job.scratch / "written_there"
    try:
        reasons = write_states(written, job.seed, python)
    except RanksFailedError as error:
        yield failed("on_1", error)
        return
    for ranks in (1, 2, 4):
        out, key = job.scratch / f"read_there_{ranks}", f"on_{ranks}"
        names = [p.name for p in cases(written) if ranks == 1 or spreads(p.name)]
        try:
            run_ranks(
                python,
                HERE / "read_with_shardkeep.py",
                [written, out, "--cases", *names],
                size=ranks,
                variables=SRC,
            )
        except RanksFailedError as error:
            yield failed(key, error)
            continue
        judged = judge(key, out, written, names=names)
        missing = tuple(not_written(reasons)) if ranks == 1 else ()
        yield Direction(key, (*judged.outcomes, *missing))


def not_written(reasons: Mapping[str, str], prefix: str = "") -> Iterator[Outcome]:
    """Yield states that could not be saved: a difference, unless the release lacks a feature."""
    for name, why in reasons.items():
        if REFUSED in why:
            yield Outcome(name, absent="refused: a DTensor does not say how it is cut twice there")
        elif why.startswith(NOT_THERE):
            yield Outcome(name, absent=prefix + why.removeprefix("NotInThisReleaseError: "))
        else:
            yield Outcome(name, 1, (f": not saved: {why}",))
