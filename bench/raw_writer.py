"""A process that writes when it is told to, raw: what others feel of the disk being busy.

python -m bench.raw_writer    # reads lines of bytes and a folder; says "done" for each
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
