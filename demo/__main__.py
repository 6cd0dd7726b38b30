"""Train on some ranks, kill them all, resume on fewer, and show that nothing was lost.

    python -m demo

All output goes to `demo/out/`, which each run replaces. The exit code is 1 if a claim in the table
at the end does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

import shardkeep as sk
from demo import claims, plot
from demo.claims import Claim, Killed, Run
from demo.job import ROOT, Job, JobFailed, adopt_orphans, environment, left_behind


class Demo:
    """The steps of the demo."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.console = Console(width=None if sys.stdout.isatty() else 112)
        self.begun = time.monotonic()
        self.folder, self.again = args.out / "run", args.out / "uninterrupted"

    def run(self) -> bool:
        """Run all steps; return whether every claim holds."""
        args = self.args
        shutil.rmtree(args.out, ignore_errors=True)
        self.act(f"{args.ranks} ranks train, and save every {args.save_every} steps")
        first, killed = self.train_and_kill()

        last = [path for path in self.steps() if opens(path)][-1]
        self.act(f"{args.then} ranks resume from the newest checkpoint that opens: {last.name}")
        second = self.train(args.then, self.folder)

        self.act(f"{args.ranks} ranks resume from a copy of it: the run as if it went on")
        for part in (last, self.recorded(last)):
            shutil.copytree(part, self.again / part.relative_to(self.folder))
        reference = self.train(args.ranks, self.again)

        self.act("other readers open the same checkpoint; the picture is drawn")
        others = {kind: self.read_with(kind, last) for kind in ("stock", "bare")}
        plot.draw(
            args.out / "loss.png",
            first=first.curve,
            second=second.curve,
            reference=reference.curve,
            saves=[record["saved"] for record in first.saves],
            ranks=(args.ranks, args.then),
        )
        return self.verdict(
            claims.saves(first, args.save_every),
            claims.nothing_left(first, killed),
            claims.holds_the_same(second, first, last),
            claims.repeats(reference, first),
            claims.goes_on(second, reference),
            *(claims.reads_the_same(kind, found) for kind, found in others.items()),
            claims.learns(first, second, args.below),
        )

    def act(self, text: str) -> None:
        self.say(f"[bold]{text}[/]")

    def say(self, text: str) -> None:
        seconds = time.monotonic() - self.begun
        self.console.print(f"[cyan]{seconds:6.1f} s[/]  {text}", highlight=False)

    def follow(self, run: Run, record: dict[str, Any]) -> None:
        """Add a record of the job's log to the run, and print it."""
        run.take(record)
        if "saved" in record:
            self.say(f"saved [green]{Path(record['path']).name}[/] in {record['seconds']:.2f} s")
        elif "resumed" in record:
            self.say(f"loaded step {record['resumed']} in {record['seconds']:.2f} s")
        elif "step" in record and (record["step"] % 10 == 0 or len(run.steps) == 1):
            self.say(
                f"step {record['step']:>3}/{self.args.steps}   loss {record['loss']:.3f}   "
                f"lr {record['lr']:.5f}   {record['seconds']:.2f} s/step"
            )

    def train(self, ranks: int, folder: Path) -> Run:
        """Train up to the last step."""
        run = Run(ranks)
        with Job(ranks, folder, self.options()) as job:
            for record in job.records():
                self.follow(run, record)
        return run

    def train_and_kill(self) -> tuple[Run, Killed]:
        """Train up to the middle of a step, then send SIGKILL to every process."""
        run = Run(self.args.ranks)
        with Job(run.ranks, self.folder, self.options()) as job:
            for record in job.records():
                self.follow(run, record)
                if record.get("step") == self.args.kill_at - 1:
                    break
            half = median(record["seconds"] for record in run.steps[-20:]) / 2
            time.sleep(half)
            signals = job.kill()
            for record in job.records():  # records that were logged since the last look
                run.take(record)
        step = len(run.steps) + 1
        self.say(f"[bold red]SIGKILL[/] for {len(signals)} processes in the middle of step {step}")
        opened = [opens(path) for path in self.steps()]
        return run, Killed(signals, half, left_behind(), len(opened), sum(opened))

    def options(self) -> list[str]:
        """Return the options of the training job."""
        names = ("steps", "save_every", "batch", "width", "layers")
        return [f"--{name.replace('_', '-')}={getattr(self.args, name)}" for name in names]

    def steps(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"))

    def recorded(self, checkpoint: Path) -> Path:
        return self.folder / "recorded" / checkpoint.name

    def read_with(self, kind: str, checkpoint: Path) -> Mapping[str, Any]:
        """Return what another reader finds, in a separate process."""
        module = [sys.executable, "-W", "ignore", "-m", "demo.checks"]
        done = subprocess.run(
            [*module, kind, str(checkpoint), str(self.recorded(checkpoint))],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            check=True,
            timeout=120,
        )
        return json.loads(done.stdout)

    def verdict(self, *shown: Claim) -> bool:
        table = Table(title="Claims", title_style="bold", show_lines=True)
        table.add_column("Claim", ratio=2)
        table.add_column("Evidence", ratio=3)
        table.add_column("Holds")
        for claim in shown:
            holds = "[green]yes[/]" if claim.holds else "[bold red]NO[/]"
            table.add_row(claim.says, claim.evidence, holds)
        self.console.print(table)
        held = sum(claim.holds for claim in shown)
        picture = os.path.relpath(self.args.out / "loss.png")
        self.say(f"[bold]{held} of {len(shown)} claims hold[/]; the picture is in {picture}")
        return held == len(shown)


def opens(path: Path) -> bool:
    """Return whether a path holds a committed checkpoint."""
    try:
        sk.open(path)
    except sk.ShardkeepError:
        return False
    return True


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "demo" / "out")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--then", type=int, default=2, help="number of ranks that resume")
    parser.add_argument("--steps", type=int, default=140)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument(
        "--kill-at", type=int, default=94, help="step in the middle of which all are killed"
    )
    parser.add_argument(
        "--below", type=float, default=2.5, help="loss that must be reached in the end"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--layers", type=int, default=3)
    args = parser.parse_args(argv)
    if not args.save_every < args.kill_at < args.steps or args.kill_at % args.save_every == 1:
        parser.error("--kill-at must come after a save, before the end, and not right after a save")
    args.out = args.out.resolve()
    return args


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the jobs, too
    adopt_orphans()
    try:
        return 0 if Demo(args).run() else 1
    except (JobFailed, subprocess.SubprocessError) as error:
        print(f"the demo failed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
