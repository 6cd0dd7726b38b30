"""A process that writes raw data on request, to show the effect of a busy disk on others.

python -m bench.raw_writer    # reads lines with a size and a folder; prints "done" for each
"""

from __future__ import annotations

import mmap
import random
import sys
from pathlib import Path

from bench.limits import PAGE, direct_write


def main() -> None:
    memory = memoryview(b"")
    for line in sys.stdin:
        nbytes, folder = line.rstrip("\n").split(" ", 1)
        size = -(-int(nbytes) // PAGE) * PAGE
        if len(memory) != size:
            memory = memoryview(mmap.mmap(-1, size))
            some = random.Random(0).randbytes(1 << 20)
            for at in range(0, size, len(some)):
                memory[at : at + len(some)] = some[: size - at]
        direct_write(Path(folder) / "raw", memory, int(nbytes), 2)
        print("done", flush=True)


if __name__ == "__main__":
    main()
