"""Opens every attack in a folder and prints a line of JSON before and after each.

It runs in a separate process, so that a crash of the interpreter fails one test only.
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
    """Collects the errors and findings of one visit."""

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
    """Do everything with a checkpoint that requires no trust."""
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
    visit(
        next(iter(sorted(root.iterdir())))
    )  # so that imports and caches do not count for an attack
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
