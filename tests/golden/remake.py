"""Make the golden checkpoints of every release, each in an environment with that release.

    python tests/golden/remake.py --seed 1 --keep ~/torch-environments
    python tests/golden/remake.py 2.3.1 2.13.0 --seed 2 --folder /somewhere/else

For each release: an environment (`compat/environments.py`), a run of `make.py` in it, and one
archive `<release>.tar.xz` beside this file. With `--folder`, the sets go there, unpacked, and no
archive is written: sets of other seeds are for testing, not for the repository.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import lzma
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent

PYTHON_313_CASES = ("nested", "objects", "optimizer", "file_per_item", "threads", "dtensor_1d")
"""Enough to have a `.metadata` that names the classes of pathlib as Python 3.13 calls them."""


@dataclass(frozen=True)
class GoldenSet:
    """One archive: which torch writes it, under which Python, and which of the cases."""

    name: str
    release: str
    python: str
    cases: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


def environments() -> ModuleType:
    """The builder in `compat/`, which is no installed package."""
    place = HERE.parents[1] / "compat" / "environments.py"
    specification = importlib.util.spec_from_file_location("environments", place)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def golden_sets(releases: Iterable[str], python: str, python313: str) -> dict[str, GoldenSet]:
    """All sets by name: one a release, and one that Python 3.13 writes."""
    # 2.7 alone imports the hub's client before it writes safetensors, even to a local path.
    hub = {"2.7.1": ("huggingface_hub",)}
    sets = [GoldenSet(r, r, python, extra=hub.get(r, ())) for r in releases]
    sets.append(GoldenSet("python313", "2.13.0", python313, PYTHON_313_CASES))
    return {golden.name: golden for golden in sets}


def pack(folder: Path, archive: Path) -> None:
    """Archive a folder so that the same files give the same bytes, whoever packs them and when."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
                entry.size = path.stat().st_size
                entry.mode = 0o644
                with path.open("rb") as file:
                    tar.addfile(entry, file)
    archive.write_bytes(lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def remake(golden: GoldenSet, folder: Path, seed: int, keep: Path | None) -> None:
    """Write one set, unpacked, to `folder`."""
    builder = environments()
    # Another Python needs an environment of its own beside the ordinary one of that release.
    place = keep and (keep if golden.name == golden.release else keep / golden.name)
    with builder.environment(
        golden.release, python=golden.python, extra=golden.extra, keep=place, slim=True
    ) as made:
        only = ["--cases", *golden.cases] if golden.cases else []
        done = made.run(HERE / "make.py", folder, "--seed", str(seed), *only, timeout=3600)
        sys.stderr.write(done.stderr if os.environ.get("VERBOSE") else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sets", nargs="*", help="releases or python313; all when none is named")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder with environments to use and to keep")
    parser.add_argument("--folder", type=Path, help="write unpacked sets here, and no archive")
    parser.add_argument("--python", default="python3.11")
    parser.add_argument("--python313", default="python3.13")
    chosen = parser.parse_args()
    known = golden_sets(environments().releases(chosen.python), chosen.python, chosen.python313)
    for name in chosen.sets or known:
        with tempfile.TemporaryDirectory() as scratch:
            folder = (chosen.folder or Path(scratch)) / name
            remake(known[name], folder, chosen.seed, chosen.keep)
            if chosen.folder is None:
                pack(folder, HERE / f"{name}.tar.xz")
        print(name, flush=True)


if __name__ == "__main__":
    main()
