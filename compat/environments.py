"""Temporary Python environments with one release of torch each.

Shardkeep promises to read what every release wrote, and to write what every release reads. Only the
release itself can prove that. So the golden checkpoints and the compatibility checks run in
environments that are made here:

    with environment("2.3.1") as env:
        env.run("script.py", "argument")

or on the command line, where the folder is kept for the next time:

    python compat/environments.py list
    python compat/environments.py make 2.3.1 --keep ~/torch-environments --slim

Only the standard library is used, and pip is started with an empty configuration, so that an
environment is the same on every machine. A release takes 3 to 6 GB on disk, because PyPI's wheels
contain CUDA. `slim` reduces that below 1 GB for work on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

FIRST_MINOR = (2, 0)
LAST_MINOR = (2, 15)
COMPANIONS = ("fsspec", "zstandard", "safetensors", "ml_dtypes")
"""Packages that torch's checkpoint writers import on demand, and that readers of their files need.

"""

DEFAULT_PYTHON = "python3.11"
"""The only minor release of Python for which every torch from 2.0 to 2.15 has a wheel."""

MARKER = "environment.json"
"""The file that is written last: a folder without it is incomplete, and is completed."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment in which one release of torch can be imported."""

    release: str
    folder: Path

    @property
    def python(self) -> Path:
        """The path of the interpreter; running it needs no activation."""
        return self.folder / "bin" / "python"

    def run(
        self,
        *arguments: str | os.PathLike[str],
        timeout: float | None = None,
        variables: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run the interpreter with `arguments`; if it fails, raise an error with its output.

        CUDA devices are hidden: the environments are for the CPU, and slim ones contain no kernels.
        """
        done = subprocess.run(
            [os.fspath(self.python), *(os.fspath(argument) for argument in arguments)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **(variables or {})},
            cwd=cwd,
            timeout=timeout,
            text=True,
            capture_output=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"torch {self.release}: exit code {done.returncode} from {arguments}\n{done.stderr}"
            )
        return done


def parse(release: str) -> tuple[int, int, int]:
    """Return the three numbers of a release such as "2.3.1", without a local part ("+cpu")."""
    major, minor, patch = release.partition("+")[0].split(".")
    return int(major), int(minor), int(patch)


def newest_patches(available: Iterable[str]) -> tuple[str, ...]:
    """Return the newest patch of each minor release in the supported range, oldest first."""
    newest: dict[tuple[int, int], tuple[int, int, int]] = {}
    for release in available:
        if re.fullmatch(r"\d+\.\d+\.\d+", release):
            number = parse(release)
            minor = number[:2]
            if FIRST_MINOR <= minor <= LAST_MINOR:
                newest[minor] = max(newest.get(minor, number), number)
    return tuple(".".join(map(str, newest[minor])) for minor in sorted(newest))


def releases(python: str = DEFAULT_PYTHON) -> tuple[str, ...]:
    """Return the newest patch of each torch minor from 2.0 to 2.15 in pip's index."""
    listing = subprocess.run(
        [python, "-m", "pip", "index", "versions", "torch"],
        env=_pip_variables(plain=True),
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    found = re.search(r"Available versions:(.*)", listing)
    if found is None:
        raise RuntimeError(f"pip does not list the versions of torch; its output was: {listing!r}")
    return newest_patches(found.group(1).replace(" ", "").split(","))


def requirements(release: str, extra: Sequence[str] = ()) -> tuple[str, ...]:
    """Return what is installed for a release. Before 2.3, torch was built against numpy 1 only."""
    numpy = "numpy<2" if parse(release) < (2, 3, 0) else "numpy"
    return (f"torch=={release}", numpy, *COMPANIONS, *extra)


@contextlib.contextmanager
def environment(
    release: str,
    *,
    python: str = DEFAULT_PYTHON,
    extra: Sequence[str] = (),
    keep: str | os.PathLike[str] | None = None,
    slim: bool = False,
    plain: bool = True,
) -> Iterator[Environment]:
    """Yield an environment with `release`, removed at the end unless `keep` names a folder for it.

    Each release has a sub-folder of `keep`, and an environment that exists there is used again.
    `plain` ignores the machine's pip configuration. `slim` removes what only GPUs need.
    """
    if keep is not None:
        yield _complete(Path(keep) / release, release, python, extra, slim, plain)
        return
    with tempfile.TemporaryDirectory(prefix=f"torch-{release}-") as folder:
        yield _complete(Path(folder), release, python, extra, slim, plain)


def _complete(
    folder: Path, release: str, python: str, extra: Sequence[str], slim: bool, plain: bool
) -> Environment:
    """Bring `folder` to the requested state, doing only what is missing."""
    made = Environment(release, folder)
    needed = set(requirements(release, extra))
    present = _installed(folder)
    if not needed <= present:
        if not made.python.exists():
            subprocess.run([python, "-m", "venv", os.fspath(folder)], check=True)
        _install(made, sorted(needed), plain)
        if slim:
            remove_gpu_parts(folder)
        made.run("-c", "import torch, torch.distributed; torch.ones(3) @ torch.ones(3)")
        (folder / MARKER).write_text(json.dumps({"requirements": sorted(needed | present)}))
    return made


def _installed(folder: Path) -> set[str]:
    """Return the requirements of a complete environment; an empty set if it is not complete."""
    try:
        return set(json.loads((folder / MARKER).read_text())["requirements"])
    except FileNotFoundError:
        return set()


def _install(made: Environment, packages: Sequence[str], plain: bool) -> None:
    subprocess.run(
        [os.fspath(made.python), "-m", "pip", "install", "--quiet", "--no-cache-dir", *packages],
        env=_pip_variables(plain),
        check=True,
    )


def _pip_variables(plain: bool) -> dict[str, str]:
    """Return the variables for pip; `plain` ignores the machine's wheels and extra indexes."""
    changes = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""} if plain else {}
    return {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **changes}


GPU_ONLY = (
    "triton",
    "torch/include",
    "torch/lib/*.a",
    "nvidia/**/*.a",
    "nvidia/**/include",
    "nvidia/**/nvvm",
    "nvidia/**/libcudnn_*engines*",
    "nvidia/**/libcudnn_*infer*",
    "nvidia/**/libcudnn_*train*",
    "nvidia/**/libnvrtc-builtins*",
    "torch/lib/libcudnn_*engines*",
    "torch/lib/libcudnn_*infer*",
    "torch/lib/libcudnn_*train*",
    "torch/lib/libnvrtc-builtins*",
)
"""Files and folders that are opened only if a GPU is used, as patterns below site-packages."""

KERNEL_SECTIONS = (".nv_fatbin", "__nv_relfatbin")
"""ELF sections with compiled GPU code: most of a CUDA library's size, and read by a GPU only."""


def remove_gpu_parts(folder: Path) -> None:
    """Remove from an environment what `import torch` and work on the CPU never read.

    Libraries that torch links against must stay, or the import fails. Their GPU code is replaced by
    a hole in the file, which takes no space on disk and reads as zeros.
    """
    for packages in folder.glob("lib/python*/site-packages"):
        for pattern in GPU_ONLY:
            for path in list(packages.glob(pattern)):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        for library in packages.rglob("*.so*"):
            if library.is_file() and not library.is_symlink():
                hollow(library)


def hollow(library: Path) -> int:
    """Turn a library's GPU code into a hole; return the number of bytes freed on disk."""
    size = library.stat().st_size
    holes = _kernel_ranges(library)
    if not holes:
        return 0
    beside = library.with_name(library.name + ".hollow")
    with library.open("rb") as source, beside.open("wb") as target:
        position = 0
        for start, end in [*holes, (size, size)]:
            source.seek(position)
            target.seek(position)
            _copy(source, target, start - position)
            position = end
        target.truncate(size)
    shutil.copymode(library, beside)
    beside.replace(library)
    return sum(end - start for start, end in holes)


def _copy(source: BinaryIO, target: BinaryIO, length: int, block: int = 1 << 22) -> None:
    while length > 0:
        data = source.read(min(block, length))
        target.write(data)
        length -= len(data)


def _kernel_ranges(library: Path) -> list[tuple[int, int]]:
    """Return the ranges (start, end) of GPU code in a 64-bit little-endian ELF file, sorted."""
    with library.open("rb") as file:
        header = file.read(64)
        if header[:6] != b"\x7fELF\x02\x01":
            return []
        (table,) = struct.unpack_from("<Q", header, 40)
        entry_size, count, names_index = struct.unpack_from("<HHH", header, 58)
        file.seek(table)
        raw = file.read(entry_size * count)
        entries = [struct.unpack_from("<IIQQQQ", raw, i * entry_size) for i in range(count)]
        if names_index >= len(entries):
            return []
        file.seek(entries[names_index][4])
        names = file.read(entries[names_index][5])
    ranges = []
    for name_at, kind, _flags, _address, offset, length in entries:
        name = names[name_at : names.index(b"\0", name_at)].decode("ascii", "replace")
        holds_bytes = kind != 8  # SHT_NOBITS takes no space in the file
        if name in KERNEL_SECTIONS and holds_bytes and length:
            ranges.append((offset, offset + length))
    return sorted(ranges)


def main(arguments: Sequence[str]) -> None:
    """List the releases, or make one environment and print its interpreter."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="print the newest patch release of each minor")
    make = commands.add_parser("make", help="make an environment and print its interpreter's path")
    make.add_argument("release")
    make.add_argument("--keep", required=True, help="folder that holds one sub-folder a release")
    make.add_argument("--python", default=DEFAULT_PYTHON)
    make.add_argument("--extra", action="append", default=[], help="further package; repeatable")
    make.add_argument("--slim", action="store_true", help="remove what only GPUs need")
    make.add_argument("--own-pip-configuration", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.command == "list":
        print("\n".join(releases()))
        return
    with environment(
        chosen.release,
        python=chosen.python,
        extra=chosen.extra,
        keep=chosen.keep,
        slim=chosen.slim,
        plain=not chosen.own_pip_configuration,
    ) as made:
        print(made.python)


if __name__ == "__main__":
    main(sys.argv[1:])
