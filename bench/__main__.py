"""Compare Shardkeep with other tools and the limits of the machine; write docs/performance.md.

    python -m bench
    python -m bench save-1 load-1 --rounds 9 --size 4

Workloads that are not named keep their last results. The exit code is 1 if a workload failed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from bench import page
from bench.machine import machine, versions
from bench.measure import Result, store, stored
from bench.race import Bench
from bench.ranks import ROOT
from bench.workloads import WORKLOADS

QUICK = {"size": 0.03, "rounds": 2, "counts": (300, 600), "steps": 20, "saves": 20}
"""The page of a quick run. Its figures mean nothing, so they do not go to docs/."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="workloads to run (default: all)")
    parser.add_argument("--list", action="store_true", help="list the workloads and exit")
    parser.add_argument("--rounds", type=int, help="rounds of each workload (default: 5)")
    parser.add_argument("--size", type=float, metavar="GB", help="size of a state (default: 2)")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes; write to build/bench")
    parser.add_argument("--out", type=Path, help="folder for results/ and the page")
    parser.add_argument(
        "--scratch", type=Path, help="folder for temporary files, on the disk to measure"
    )
    parser.add_argument(
        "--page", action="store_true", help="only write the page again, from the stored results"
    )
    chosen = parser.parse_args(argv)
    unknown = [name for name in chosen.names if name not in WORKLOADS]
    if unknown:
        parser.error(f"unknown workload {unknown[0]!r}; choose from {', '.join(WORKLOADS)}")
    return chosen


def places(chosen: argparse.Namespace) -> tuple[Path, Path]:
    """Return the folder of the results and the path of the page."""
    out = chosen.out or (ROOT / "build" / "bench" if chosen.quick else None)
    if out is None:
        return ROOT / "bench" / "results", ROOT / "docs" / "performance.md"
    return out / "results", out / "performance.md"


def bench_of(chosen: argparse.Namespace, folder: Path, say: Console) -> Bench:
    quick = QUICK if chosen.quick else {}
    sized = {name: quick[name] for name in ("counts", "steps", "saves") if name in quick}
    return Bench(
        folder,
        rounds=chosen.rounds or quick.get("rounds", 5),
        nbytes=int(1e9 * (chosen.size or quick.get("size", 2.0))),
        say=lambda line: say.print(line, highlight=False, markup=False, soft_wrap=True),
        **sized,
    )


def run(name: str, bench: Bench, results: Path) -> bool:
    """Run one workload in a folder of its own; return whether it succeeded."""
    here = machine(bench.folder) | versions()
    fine, began = True, time.monotonic()
    bench.say(f"{name}: {WORKLOADS[name].about}")
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=bench.folder) as folder:
        try:
            found = list(WORKLOADS[name].run(replace(bench, folder=Path(folder))))
        except Exception as error:
            bench.say(f"  failed: {type(error).__name__}: {error}")
            why = str(error).strip().splitlines() or [type(error).__name__]
            about = WORKLOADS[name].about
            found = [Result(name, about.capitalize(), name, "failed", 0, 0, error=why[-1])]
            fine = False
        for result in found:
            result.date, result.machine = datetime.date.today().isoformat(), here
            store(result, results)
    bench.say(f"  {time.monotonic() - began:.0f} s")
    return fine


def main() -> int:
    chosen, console = arguments(), Console()
    if chosen.list:
        for name, workload in WORKLOADS.items():
            console.print(f"{name:14} {workload.about}", highlight=False)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the rank processes, too
    results, where = places(chosen)
    fine = True
    if not chosen.page:
        scratch = chosen.scratch or ROOT / "build"
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="bench-", dir=scratch) as folder:
            bench = bench_of(chosen, Path(folder), console)
            for name in chosen.names or WORKLOADS:
                fine = run(name, bench, results) and fine
    known = stored(results)
    page.write(known, where)
    from bench import plot

    plot.draw(known, where.with_name(page.PICTURE))
    console.print(f"wrote {os.path.relpath(where)}", highlight=False)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
