"""`python -m fuzz`: pass broken and hostile bytes to everything that reads a checkpoint."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from os import cpu_count, environ
from pathlib import Path
from typing import Any

from fuzz.targets import SHARES, TARGETS

KEPT = Path("build/fuzz")
_BATCH = 100_000
"""The number of cases per process."""
_SLOW = 0.05
"""Average seconds per case after which a process counts as hanging."""


@dataclass
class Total:
    """The results of one target."""

    cases: int = 0
    values: int = 0
    refused: int = 0
    ways: int = 0
    found: list[str] = field(default_factory=list)

    def add(self, report: dict[str, Any]) -> None:
        self.cases += report["cases"]
        self.values += report["values"]
        self.refused += report["refused"]
        self.ways = max(self.ways, report["ways"])
        self.found += report["found"]


def batches(cases: int, targets: list[str], seed: int) -> Iterator[tuple[str, int, int]]:
    """Yield target, number of cases and seed of each process, for all targets in turn."""
    shares = {target: SHARES.get(target, 3) for target in targets}
    left = {target: -(-cases * share // sum(shares.values())) for target, share in shares.items()}
    number = 0
    while any(left.values()):
        for target, count in left.items():
            if count:
                yield target, min(count, _BATCH), seed * 1000 + number
            left[target] = max(0, count - _BATCH)
        number += 1


def run(batch: tuple[str, int, int], seconds: float) -> dict[str, Any]:
    """Run one process. Its death or a hang is a finding, too, and the case is kept."""
    target, cases, seed = batch
    with tempfile.TemporaryDirectory() as folder:
        last = Path(folder) / "case"
        command = [sys.executable, "-m", "fuzz.worker", target, str(cases), str(seed)]
        limit = 60 + min(_SLOW * cases, 3 * seconds)
        settings = {**environ, "SHARDKEEP_READ_THREADS": "1", "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                [*command, str(seconds), str(last), str(KEPT)],
                capture_output=True, text=True, timeout=limit, check=False, env=settings,
            )  # fmt: skip
            if done.returncode == 0:
                return dict(json.loads(done.stdout.splitlines()[-1]))
            how = f"exit code {done.returncode}: {done.stderr[-2000:]}"
        except subprocess.TimeoutExpired:
            how = f"not finished after {limit:.0f} s"
        KEPT.mkdir(parents=True, exist_ok=True)
        if last.exists():
            data = last.read_bytes()
            size = int.from_bytes(data[:8], "little")
            (KEPT / f"{target.replace(' ', '-')}-{seed}-end").write_bytes(data[8 : 8 + size])
    return {"target": target, "cases": 0, "values": 0, "refused": 0, "ways": 0, "found": [how]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument(
        "--cases", type=int, default=100_000, help="number of cases in all (default: 100,000)"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="approximate time limit")
    parser.add_argument("--seed", type=int, default=1, help="seed of the cases (default: 1)")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only these")
    parser.add_argument(
        "--jobs", type=int, default=cpu_count() or 1, help="number of parallel processes"
    )
    given = parser.parse_args()
    targets = given.target or list(TARGETS)
    if importlib.util.find_spec("torch") is None:
        targets = [target for target in targets if target != "torch object"]
    began, totals = time.monotonic(), {target: Total() for target in targets}
    work = list(batches(given.cases, targets, given.seed))
    each = given.seconds * given.jobs / len(work)
    with ThreadPoolExecutor(given.jobs) as pool:
        for report in pool.map(lambda batch: run(batch, each), work):
            totals[report["target"]].add(report)
    print(f"{'target':20}{'cases':>10}{'values':>10}{'refused':>10}{'ways':>6}{'found':>7}")
    for target, one in totals.items():
        row = f"{one.cases:>10,}{one.values:>10,}{one.refused:>10,}{one.ways:>6}"
        print(f"{target:20}{row}{len(one.found):>7}")
    found = [text for one in totals.values() for text in one.found]
    for text in found[:20]:
        print(text, file=sys.stderr)
    cases = sum(one.cases for one in totals.values())
    print(f"{cases:,} cases in {time.monotonic() - began:.0f} s, {len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
