"""Train on some ranks, kill them all, resume on fewer, and show that nothing was lost.

    python -m demo

Everything goes to `demo/out/`, which is made anew each time. The exit code is 1 if any claim of the
table at the end does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import shardkeep as sk
from demo import plot
from demo.job import ROOT, Job, JobFailed, adopt_orphans, environment

Record = dict[str, Any]


@dataclass(slots=True)
class Run:
    """What one job logged."""

    ranks: int
    steps: list[Record] = field(default_factory=list)
    saves: list[Record] = field(default_factory=list)
    resumed: Record = field(default_factory=dict)
    compared: list[Record] = field(default_factory=list)

    def take(self, record: Record) -> None:
        for key, place in (
            ("step", self.steps),
            ("saved", self.saves),
            ("compared", self.compared),
        ):
            if key in record:
                place.append(record)
        if "resumed" in record:
            self.resumed = record

    def curve(self) -> dict[int, float]:
        return {record["step"]: record["loss"] for record in self.steps}


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence, what was measured, and whether that bears it out."""

    says: str
    evidence: str
    holds: bool


class Demo:
    """The story, act by act; every act adds what it has shown to `claims`."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args, self.console = args, console
        self.begun = time.monotonic()
        self.folder, self.again = args.out / "run", args.out / "uninterrupted"
        self.claims: list[Claim] = []

    def run(self) -> bool:
        args = self.args
        shutil.rmtree(args.out, ignore_errors=True)
        self.say(
            f"[bold]{args.ranks} ranks[/] train from nothing, saving every {args.save_every} steps"
        )
        first = self.train_and_kill()
        last = self.newest()
        self.saved_and_learned(first)

        self.say(f"[bold]{args.then} ranks[/] resume from {last.name}")
        second = self.train(args.then, self.folder)
        self.holds_what_was_saved(second, last)

        self.say(
            f"[bold]{args.ranks} ranks[/] resume from a copy of it: the run as if never killed"
        )
        for part in (last, self.witness(last)):
            shutil.copytree(part, self.again / part.relative_to(self.folder))
        reference = self.train(args.ranks, self.again)
        self.loss_goes_on(first, second, reference)

        self.say("other readers open the same checkpoint")
        self.others_read_it(last)
        picture = args.out / "loss.png"
        plot.draw(
            picture,
            first=first.curve(),
            second=second.curve(),
            reference=reference.curve(),
            saves=[record["saved"] for record in first.saves],
            ranks=(args.ranks, args.then),
        )
        self.say(f"plotted: {os.path.relpath(picture)}")
        return self.verdict()

    def say(self, text: str) -> None:
        self.console.print(
            f"[cyan]{time.monotonic() - self.begun:6.1f} s[/]  {text}", highlight=False
        )

    def follow(self, run: Run, record: Record) -> None:
        """Take a record, and tell the person who watches."""
        run.take(record)
        if "saved" in record:
            self.say(f"saved [green]{Path(record['path']).name}[/] in {record['seconds']:.2f} s")
        elif "resumed" in record:
            self.say(f"loaded step {record['resumed']} in {record['seconds']:.2f} s")
        elif "step" in record and (record["step"] % 10 == 0 or len(run.steps) == 1):
            self.say(
                f"step {record['step']:>3}/{self.args.steps}   loss {record['loss']:.3f}"
                f"   lr {record['lr']:.5f}   {record['seconds']:.2f} s/step"
            )

    def options(self) -> list[str]:
        """What the job itself is told."""
        names = ("steps", "save_every", "batch", "width", "layers")
        return [f"--{name.replace('_', '-')}={getattr(self.args, name)}" for name in names]

    def train(self, ranks: int, folder: Path) -> Run:
        """To the last step."""
        run = Run(ranks)
        with Job(ranks, folder, self.options()) as job:
            for record in job.records():
                self.follow(run, record)
        return run

    def train_and_kill(self) -> Run:
        """Up to the middle of step `kill_at`, where every process gets SIGKILL."""
        args, run = self.args, Run(self.args.ranks)
        with Job(args.ranks, self.folder, self.options()) as job:
            for record in job.records():
                self.follow(run, record)
                if record.get("step") == args.kill_at - 1:
                    pause = statistics.median(step["seconds"] for step in run.steps[-20:]) / 2
                    time.sleep(pause)
                    signals = job.kill()
                    break
            for record in job.records():
                run.take(record)
        step = run.steps[-1]["step"] + 1
        self.say(
            f"[bold red]SIGKILL[/] for all {len(signals)} processes, in the middle of step {step}"
        )
        folders = sorted(self.folder.glob("step_*"))
        left = left_behind()
        self.claim(
            "Every process was killed in the middle of a step, and nothing is left to clean up",
            f"SIGKILL ended {signals.count(signal.SIGKILL)} of {args.ranks + 1} processes "
            f"{pause:.2f} s into step {step}; {left} processes left; "
            f"{sum(map(opens, folders))} of {len(folders)} step folders open",
            len(signals) == args.ranks + 1
            and set(signals) == {signal.SIGKILL}
            and left == 0
            and all(map(opens, folders))
            and (step - 1) % args.save_every != 0,
        )
        return run

    def newest(self) -> Path:
        """The last committed checkpoint."""
        return [path for path in sorted(self.folder.glob("step_*")) if opens(path)][-1]

    def witness(self, checkpoint: Path) -> Path:
        return self.folder / "witness" / checkpoint.name

    def saved_and_learned(self, run: Run) -> None:
        seconds = [record["seconds"] for record in run.saves]
        size = sum(path.stat().st_size for path in Path(run.saves[-1]["path"]).iterdir())
        losses = list(run.curve().values())
        after = statistics.mean(losses[-10:])
        self.claim(
            f"{run.ranks} ranks train on real text, and learn",
            f"loss {losses[0]:.2f} → {after:.2f} (mean of the last 10) in {len(losses)} steps",
            after < min(losses[0], self.args.below),
        )
        self.claim(
            f"{run.ranks} ranks save together",
            f"{len(seconds)} checkpoints of {megabytes(size)}; {statistics.median(seconds):.2f} s "
            f"each (median; slowest {max(seconds):.2f} s), durable",
            len(seconds) == (self.args.kill_at - 1) // self.args.save_every,
        )

    def holds_what_was_saved(self, run: Run, checkpoint: Path) -> None:
        """After loading, before the first step, every rank compared all that it holds."""
        found = sorted(run.compared, key=lambda record: record["rank"])
        names = set().union(*(record["compared"]["tensors"] for record in found))
        gone = {f"rng.rank_{rank}" for rank in range(run.ranks, self.args.ranks)}
        absent = set.intersection(*(set(record["compared"]["absent"]) for record in found))
        differ = sum(len(record["compared"]["differ"]) for record in found)
        model = sum(name.startswith("model.") for name in names)
        moments = sum(name.endswith((".exp_avg", ".exp_avg_sq")) for name in names)
        steps = sum(name.endswith(".step") for name in names)
        nbytes = sum(record["compared"]["nbytes"] for record in found)
        self.claim(
            f"{run.ranks} ranks hold what {self.args.ranks} ranks saved, bit for bit",
            f"{len(names)} tensors ({model} of the model, {moments} AdamW moments, {steps} steps, "
            f"{run.ranks} RNG states) and {len(found[0]['compared']['values'])} values compared on "
            f"{len(found)} ranks, {megabytes(nbytes)}; {differ} differ; "
            f"{found[0]['resharded']} resharded; loaded in {run.resumed['seconds']:.2f} s",
            len(found) == run.ranks
            and differ == 0
            and absent == gone
            and min(model, moments, steps) > 0
            and run.resumed["path"] == str(checkpoint),
        )

    def loss_goes_on(self, first: Run, second: Run, reference: Run) -> None:
        before, after, uninterrupted = first.curve(), second.curve(), reference.curve()
        lost = sorted(before.keys() & uninterrupted.keys())
        same = sum(before[step] == uninterrupted[step] for step in lost)
        self.claim(
            f"On {first.ranks} ranks, the lost steps come again exactly (data, RNG, schedule)",
            f"steps {lost[0]} to {lost[-1]}: {same} of {len(lost)} losses equal to the last bit",
            same == len(lost) > 0,
        )
        apart = statistics.mean(abs(after[step] - uninterrupted[step]) for step in after)
        rates = [[step["lr"] for step in run.steps] for run in (second, reference)]
        ends = [statistics.mean(list(curve.values())[-10:]) for curve in (after, uninterrupted)]
        self.claim(
            f"On {second.ranks} ranks, the loss goes on where it was (only dropout differs)",
            f"{len(after)} steps: {apart:.3f} apart on average; the last ten at {ends[0]:.3f}, "
            f"uninterrupted {ends[1]:.3f}; the same learning rates",
            after.keys() == uninterrupted.keys() and apart < 0.1 and rates[0] == rates[1],
        )

    def others_read_it(self, checkpoint: Path) -> None:
        for kind, says, imports in (
            ("stock", "Stock torch.distributed.checkpoint reads the same", ["torch"]),
            ("bare", "shardkeep.open reads the same, without torch", ["shardkeep"]),
        ):
            command = ["-m", "demo.checks", kind, str(checkpoint), str(self.witness(checkpoint))]
            done = subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment(),
                stdout=subprocess.PIPE,
                check=True,
                timeout=120,
            )
            found = json.loads(done.stdout)
            wrong = [*found["differ"], *found["absent"]]
            self.claim(
                f"{says}, bit for bit",
                f"{len(found['tensors'])} tensors and {len(found['values'])} values, "
                f"{megabytes(found['nbytes'])}; {len(wrong)} differ; {found['seconds']:.2f} s; "
                f"the process imported {' and '.join(found['imported'])} only",
                not wrong and found["imported"] == imports and len(found["tensors"]) > 0,
            )

    def claim(self, says: str, evidence: str, holds: bool) -> None:
        self.claims.append(Claim(says, evidence, holds))

    def verdict(self) -> bool:
        table = Table(title="What was shown", title_style="bold", show_lines=True)
        table.add_column("Claim", ratio=3)
        table.add_column("Evidence", ratio=5)
        table.add_column("Holds")
        for claim in self.claims:
            table.add_row(
                claim.says, claim.evidence, "[green]yes[/]" if claim.holds else "[red]NO[/]"
            )
        self.console.print(table)
        held = sum(claim.holds for claim in self.claims)
        self.say(f"{held} of {len(self.claims)} claims hold")
        return held == len(self.claims)


def opens(path: Path) -> bool:
    """Whether a committed checkpoint is there."""
    try:
        sk.open(path)
    except sk.ShardkeepError:
        return False
    return True


def left_behind() -> int:
    """How many processes that this one started, or adopted, are still there."""
    left = 0
    try:
        while True:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                return left + 1
            left += 1
    except ChildProcessError:
        return left


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "demo" / "out")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--then", type=int, default=2, help="ranks that resume")
    parser.add_argument("--steps", type=int, default=140)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--kill-at", type=int, default=94, help="the step that is not finished")
    parser.add_argument(
        "--below", type=float, default=2.5, help="the loss to reach before the kill"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--layers", type=int, default=4)
    return parser.parse_args(argv)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    adopt_orphans()
    args = arguments()
    args.out = args.out.resolve()
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        return 0 if Demo(args, console).run() else 1
    except (JobFailed, subprocess.SubprocessError) as error:
        console.print(f"[red]{error}[/]", markup=False)
        return 1


if __name__ == "__main__":
    sys.exit(main())
