"""`python -m shardkeep` is the command `shardkeep`."""

from __future__ import annotations

import sys

from shardkeep.cli import main

if __name__ == "__main__":
    sys.exit(main())
