"""Checkpoints with every kind of content, and the effect of one changed byte on reading them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as stock

import shardkeep as sk


def state(seed: int = 3) -> dict[str, Any]:
    """Return a state with tensors of every kind that has its own way of being read, and objects."""
    generator = torch.Generator().manual_seed(seed)
    tied = torch.rand(40, generator=generator)
    return {
        "scalar": torch.rand((), generator=generator),
        "small": torch.rand(20, 3, generator=generator),
        "block": torch.rand(50_000, generator=generator),
        "large": torch.rand(300, 500, generator=generator),
        "across": torch.rand(260, 400, generator=generator).T,
        "bits": torch.randint(0, 9, (30,), generator=generator, dtype=torch.uint16),
        "tied": tied,
        "again": tied,
        "step": 7,
        "text": "x" * 40,
        "long": [*range(5000)],
        "odd": ({"inside": torch.rand(4, generator=generator)}, 1),
        "conj": torch.view_as_complex(torch.rand(5, 2, generator=generator)).conj(),
    }


def blank(like: dict[str, Any]) -> dict[str, Any]:
    return {
        name: torch.zeros_like(value) if isinstance(value, torch.Tensor) else None
        for name, value in like.items()
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one.resolve_conj().contiguous(), other.resolve_conj().contiguous())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def save_stock(path: Path, **writer: Any) -> None:
    stock.save(state(), storage_writer=stock.FileSystemWriter(str(path), **writer), no_dist=True)


def by_load(path: Path) -> bool:
    """Return whether a load restores every value as saved; errors of the load are raised."""
    wanted = state()
    loaded = blank(wanted)
    sk.load(loaded, path)
    return same(loaded, wanted)


def by_read(path: Path, **how: Any) -> bool:
    """Return whether reading with numpy, without torch, gives every value as saved."""
    checkpoint, wanted = sk.open(path, **how), state()
    for name, value in wanted.items():
        found = checkpoint.read(name)
        if isinstance(value, torch.Tensor):
            plain = value.resolve_conj().contiguous()
            if plain.dtype is torch.uint16:
                plain = plain.view(torch.int16)
            if found.tobytes() != plain.numpy().tobytes():
                return False
        elif name == "odd":
            inside = value[0]["inside"].numpy().tobytes()
            if (found[0]["inside"].tobytes(), found[1]) != (inside, value[1]):
                return False
        elif found != value:
            return False
    return True


@contextmanager
def changed(file: Path, at: int, bit: int) -> Iterator[None]:
    with file.open("r+b") as opened:
        opened.seek(at)
        (before,) = opened.read(1)
        opened.seek(at)
        opened.write(bytes([before ^ (1 << bit)]))
        opened.flush()
        try:
            yield
        finally:
            opened.seek(at)
            opened.write(bytes([before]))


def outcome(work: Callable[[], bool], file: str) -> str:
    """Return "same", "refused" if the error names the file, or a description of the failure."""
    try:
        return "same" if work() else "other values came back"
    except (sk.Damaged, sk.FormatError) as error:
        # Damaged metadata may be detected only in a file that it refers to.
        named = error.file if file == ".metadata" else file in str(error)
        return "refused" if named else f"no file is named: {error}"
    except sk.NotACheckpoint:
        return "refused" if file == ".metadata" else "nothing found"
    except (
        sk.Mismatch
    ) as error:  # names, shapes and dtypes of `.metadata` have no checksum of theirs
        return "refused" if file == ".metadata" else f"another template: {error}"


def copy(path: Path, to: Path) -> Path:
    shutil.copytree(path, to)
    return to
