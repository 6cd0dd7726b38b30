"""Malicious checkpoints. `python -m attacks.make FOLDER` writes each into a folder of its name.

Each must be refused with an error that names the file and the place, or open as inert data. Either
must happen within a second, in little memory and without executing code. `test_attacks.py` in
tests/tools checks this.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from attacks import executing, packing, pickling, pointing, sets
from attacks.attack import CANARY, Attack

__all__ = ["ATTACKS", "CANARY", "Attack"]

_GROUPS = (executing, pickling, pointing, packing, sets)

ATTACKS: Mapping[str, Attack] = {
    name: attack for group in _GROUPS for name, attack in group.attacks()
}
"""All attacks by name."""


def main() -> None:
    root = Path(sys.argv[1])
    for name, attack in ATTACKS.items():
        folder = root / name
        folder.mkdir(parents=True)
        attack.build(folder)
        print(f"{name}: {attack.what}")


if __name__ == "__main__":
    main()
