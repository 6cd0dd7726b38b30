"""Runs many cases of one target in a separate process; prints one line of JSON."""

from __future__ import annotations

import codecs
import json
import os
import random
import re
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

from fuzz import guard
from fuzz.mutators import MUTATORS
from fuzz.targets import ALLOWED, TARGETS

_CODECS = "raw_unicode_escape utf_16 utf_16_le utf_16_be utf_32 utf_32_le utf_32_be".split()
"""Codecs of texts in pickles and JSON, imported beforehand as Python imports them on first use."""
CORPUS = Path(__file__).with_name("corpus")
_MOST = 64 * 1024
"""The largest case in bytes that is mutated further."""
_POOL = 400
_WORDS = re.compile(r"'[^']*'|\"[^\"]*\"|[0-9]+")


def seeds(target: str) -> list[bytes]:
    """Return the corpus of a target."""
    folder = CORPUS / target.replace(" ", "-")
    return [file.read_bytes() for file in sorted(folder.iterdir())]


class Fuzzer:
    """The cases of one target. Cases with a new kind of result are mutated further."""

    def __init__(self, target: str, seed: int) -> None:
        self.target = target
        self.dice = random.Random(f"{target} {seed}")
        self.first = seeds(target)
        self.pool = list(self.first)
        self.ways: Counter[str] = Counter()
        self.found: list[str] = []
        self.run = TARGETS[target]

    def case(self) -> bytes:
        mutate = self.dice.choice(MUTATORS[self.target])
        # Half of the cases start from the corpus, as others are mostly refused early.
        pool = self.first if self.dice.randrange(2) else self.pool
        return mutate(self.dice.choice(pool), self.dice.choice(self.first), self.dice)

    def check(self, data: bytes) -> bool:
        """Run a case; return whether its result is allowed, and record the kind of result."""
        try:
            with guard.within_time():
                self.run(data)
            way = "a value"
        except ALLOWED as error:
            way = f"{type(error).__name__}: {_WORDS.sub('_', str(error))[-100:]}"
        except BaseException:
            self.found.append(traceback.format_exc(limit=-6))
            return False
        self.ways[way] += 1
        if self.ways[way] == 1 and len(data) <= _MOST and len(self.pool) < _POOL:
            self.pool.append(data)
        return True


def main(target: str, cases: int, seed: int, seconds: float, last: str, keep: str) -> None:
    """Run that many cases, or until the time limit.

    The running case is kept in the file `last`; failing cases are written to the folder `keep`.
    """
    fuzzer = Fuzzer(target, seed)
    for data in fuzzer.first:  # so that imports and caches do not count for a case
        fuzzer.run(data)
    for codec in _CODECS:
        codecs.lookup(codec)
    began, end = time.process_time(), time.monotonic() + seconds
    done = 0
    descriptor = os.open(last, os.O_RDWR | os.O_CREAT)
    guard.limit_memory()
    guard.watch()
    while done < cases and time.monotonic() < end:
        done += 1
        data = fuzzer.case()
        os.pwrite(descriptor, len(data).to_bytes(8, "little") + data, 0)
        if not fuzzer.check(data):
            Path(keep).mkdir(parents=True, exist_ok=True)
            name = f"{target.replace(' ', '-')}-{seed}-{len(fuzzer.found)}"
            (Path(keep) / name).write_bytes(data)
            (Path(keep) / f"{name}.txt").write_text(fuzzer.found[-1])
    values = fuzzer.ways.pop("a value", 0)
    report = {
        "target": target,
        "cases": done,
        "values": values,
        "refused": sum(fuzzer.ways.values()),
        "ways": len(fuzzer.ways),
        "found": fuzzer.found,
        "seconds": time.process_time() - began,
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    name, cases, seed, seconds, last, keep = sys.argv[1:]
    main(name, int(cases), int(seed), float(seconds), last, keep)
