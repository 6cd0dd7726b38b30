"""Check releases of torch against Shardkeep, in both directions.

    python -m compat 2.3.1
    python -m compat --all

The exit code is 1 if anything differs. Each release has an environment of its own, which is removed
at the end unless `--keep` (or COMPAT_KEEP) names a folder for it.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from compat import page
from compat.directions import Job, shardkeep_reads, shardkeep_runs, torch_reads, write_states
from compat.environments import environment, parse, releases
from compat.results import Direction, Result, store, stored

RUNTIME = ("isal",)
"""Packages that Shardkeep's core needs, besides those of every environment."""

HUB = "huggingface_hub"
"""2.7 alone imports it before it writes safetensors, even to a local path."""

PARTS = {"A": torch_reads, "B": shardkeep_reads, "C": shardkeep_runs}


def check(job: Job, parts: str) -> Result:
    """Run the directions for one release."""
    made = job.environment
    began = time.monotonic()
    versions = made.run(
        "-c",
        "import platform, numpy; print(platform.python_version(), numpy.__version__)",
    ).stdout.split()
    found: list[Direction] = [one for part in parts for one in PARTS[part](job)]
    return Result(
        release=made.release,
        python=versions[0],
        numpy=versions[1],
        writer=str(torch.__version__),
        date=datetime.date.today().isoformat(),
        seed=job.seed,
        seconds=round(time.monotonic() - began, 1),
        directions=tuple(found),
    )


def extras(release: str) -> tuple[str, ...]:
    return (*RUNTIME, HUB) if parse(release)[:2] == (2, 7) else RUNTIME


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m compat", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("releases", nargs="*", help='such as "2.3.1"')
    parser.add_argument("--all", action="store_true", help="every minor release, and the page")
    parser.add_argument("--keep", default=os.environ.get("COMPAT_KEEP"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=7, help="seed for the values of the states")
    parser.add_argument(
        "--parts",
        default="ABC",
        help="A: the release reads, B: Shardkeep reads, C: Shardkeep runs on the release",
    )
    parser.add_argument("--scratch", type=Path, help="keep the checkpoints here")
    parser.add_argument("--page", action="store_true", help="write the page from stored results")
    chosen = parser.parse_args()
    if not (chosen.releases or chosen.all or chosen.page):
        parser.error("name a release, or --all")
    return chosen


def main() -> int:
    chosen, console = arguments(), Console()
    wanted = releases(sys.executable) if chosen.all else tuple(chosen.releases)
    for release in wanted:
        if not re.fullmatch(r"\d+\.\d+\.\d+", release):
            raise SystemExit(f"{release!r} is not a release: give three numbers, such as 2.3.1")
    fine = True
    with tempfile.TemporaryDirectory(prefix="compat-") as temporary:
        scratch = chosen.scratch or Path(temporary)
        written = scratch / "written"
        not_saved: dict[str, str] = {}
        if wanted and "A" in chosen.parts:
            console.print(f"[dim]Shardkeep saves its states on torch {torch.__version__}[/dim]")
            not_saved = write_states(written, chosen.seed)
        for release in wanted:
            with environment(release, keep=chosen.keep, extra=extras(release), slim=True) as made:
                job = Job(made, scratch / release, written, not_saved, chosen.seed)
                result = check(job, chosen.parts)
            page.show(result, console)
            if chosen.parts == "ABC":
                store(result)
            fine = fine and result.same
    if chosen.all or chosen.page:
        page.write(stored())
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
