"""Opens every attack below a folder and prints what happened, one JSON line before and after each.

Runs in a process of its own: a crash of the interpreter must be a failed test, not the end of all.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import shardkeep
from shardkeep.errors import Damaged, FormatError, ShardkeepError
from shardkeep.format.pickle.reader import opaque_classes


class Watch:
    """Collects what the steps of one visit raise, and what they find."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.vague: list[str] = []
        self.crashes: list[str] = []
        self.opaque: set[str] = set()

    def attempt(self, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except ShardkeepError as error:
            self.note(error)
        except BaseException:
            self.crashes.append(traceback.format_exc(limit=-4))
        return None

    def note(self, error: ShardkeepError) -> None:
        self.errors.append(str(error))
        if not isinstance(error, (FormatError, Damaged)) or not error.file:
            self.vague.append(str(error))


def visit(folder: Path) -> Watch:
    """Do to a checkpoint whatever one can do without trusting it."""
    watch = Watch()
    checkpoint = watch.attempt(lambda: shardkeep.open(folder))
    if checkpoint is None:
        return watch
    for name in watch.attempt(lambda: list(checkpoint)) or ():
        watch.attempt(lambda name=name: checkpoint[name])
        value = watch.attempt(lambda name=name: checkpoint.read(name))
        watch.opaque.update(opaque_classes(value))
        repr(value)
    watch.attempt(checkpoint.tree)
    report = watch.attempt(checkpoint.verify)
    for damage in report.damaged if report else ():
        watch.note(damage)
    return watch


def reports(root: Path) -> Iterator[dict[str, Any]]:
    visit(next(iter(sorted(root.iterdir()))))  # imports and caches are not the attack's
    for folder in sorted(root.iterdir()):
        yield {"name": folder.name}
        start = time.process_time()
        watch = visit(folder)
        seconds = time.process_time() - start
        tracemalloc.start()
        visit(folder)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        yield {
            "name": folder.name,
            "seconds": seconds,
            "bytes": peak,
            "errors": watch.errors,
            "vague": watch.vague,
            "crashes": watch.crashes,
            "opaque": sorted(watch.opaque),
        }


if __name__ == "__main__":
    for report in reports(Path(sys.argv[1])):
        print(json.dumps(report), flush=True)
