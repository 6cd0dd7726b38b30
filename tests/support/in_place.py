"""`shardkeep.dcp` in the place of `torch.distributed.checkpoint` for the imports in a block."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
import torch.distributed.checkpoint as stock

import shardkeep.dcp as ours

__all__ = ["in_place_of_torchs"]

_THEIRS, _OURS = stock.__name__, ours.__name__


@contextmanager
def in_place_of_torchs() -> Iterator[None]:
    """Make imports of torch's package and of all its modules return Shardkeep's in the block."""
    # Imported before the replacement: in the block, torch's own modules can't be imported any more.
    for found in pkgutil.walk_packages(ours.__path__, f"{_OURS}."):
        importlib.import_module(found.name)
    own = {name: module for name, module in sys.modules.items() if _below(name, _OURS)}
    before = {name: module for name, module in sys.modules.items() if _below(name, _THEIRS)}
    for name, module in own.items():
        sys.modules[_THEIRS + name.removeprefix(_OURS)] = module
    dist.checkpoint = ours
    try:
        yield
    finally:
        for name in [name for name in sys.modules if _below(name, _THEIRS)]:
            del sys.modules[name]
        sys.modules.update(before)
        dist.checkpoint = stock


def _below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")
