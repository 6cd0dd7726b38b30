"""Kill saves of four ranks at random moments; each time, the newest committed step must be whole.

    python -m crash --moments 1000

Results are kept in a file, so a run that was stopped continues where it was. The exit code is 1 if
any check failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crash.plans import KNOBS, MODES, draw

if TYPE_CHECKING:
    from crash.trial import Result

ROOT = Path(__file__).parent.parent


def run(moments: int, seed: int, file: Path, *, seconds: float) -> tuple[list[Result], list[str]]:
    """Continue up to `moments` results or the time limit; return all results and the leftovers."""
    from crash.notes import Notes
    from crash.state import RANKS
    from crash.trial import Result, attempt, settle, spans_of

    file.parent.mkdir(parents=True, exist_ok=True)
    results = [Result.of(line) for line in file.read_text().splitlines()] if file.exists() else []
    number = 1 + max((one.number for one in results if one.seed == seed), default=-1)
    notes, begun = Notes(RANKS), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="crash-") as folder, file.open("a") as log:
        root = Path(folder)
        spans: dict[tuple[str, str], float] = {}
        for mode in MODES:
            spans |= spans_of(mode, root, notes)
        while len(results) < moments and time.monotonic() - begun < seconds:
            result = attempt(draw(seed, number, root, RANKS, spans), notes)
            number += 1
            if result is None:  # the job ended before the kill, so this moment does not count
                continue
            results.append(result)
            log.write(f"{result.line()}\n")
            log.flush()
            _tell(results, moments)
        left = [what for mode in MODES for what in settle(mode, root, notes)]
    return results, left


def _tell(results: Sequence[Result], moments: int) -> None:
    last = results[-1]
    for what in last.wrong:
        print(f"moment {last.number} ({last.mode}, {last.whom}, {last.fell}): {what}", flush=True)
    if len(results) % 25 == 0 or len(results) == moments:
        wrong = sum(bool(one.wrong) for one in results)
        print(f"{len(results):>5} of {moments} moments, {wrong} failures", flush=True)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m crash", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--moments",
        type=int,
        default=1000,
        help="number of moments, with those of earlier runs (default: 1000)",
    )
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after that many seconds"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "crash.jsonl")
    parser.add_argument("--page", type=Path, help="page to write the figures to")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    os.environ.update(KNOBS)
    results, left = run(args.moments, args.seed, args.results, seconds=args.seconds)
    from crash import report

    text = report.summary(results)
    print(text, *(f"After the run: {what}" for what in left), sep="\n")
    if args.page:
        report.write(args.page, text)
    return 1 if left or any(one.wrong for one in results) else 0


if __name__ == "__main__":
    sys.exit(main())
