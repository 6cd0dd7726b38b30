"""What is torch's own and handed on: whole modules, and the rest of modules that are partly ours.

Classes that planners, storage and metadata are made of must be torch's own, as users derive from
them and compare them. So a module of `torch.distributed.checkpoint` that has no file here appears
under `shardkeep.dcp` as it is (the same module object), in whatever release is installed.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed.checkpoint as stock

__all__ = ["hand_on", "rest_of", "theirs"]

_THEIRS, _OURS = stock.__name__, __package__ or ""
_OWN = frozenset(file.stem for file in Path(__file__).parent.glob("*.py"))


def theirs(*names: str) -> ModuleType | None:
    """The first of these modules of torch's package that this release has."""
    for name in names:
        with suppress(ImportError):
            return importlib.import_module(f"{_THEIRS}.{name}")
    return None


def hand_on() -> None:
    """Make every module of torch's that has no file here one of this package."""
    for found in pkgutil.walk_packages(stock.__path__, f"{_THEIRS}."):
        name = found.name.removeprefix(f"{_THEIRS}.")
        if name in _OWN:
            continue
        with suppress(ImportError):  # It needs what is not installed.
            module = importlib.import_module(found.name)
            sys.modules[f"{_OURS}.{name}"] = module
            if "." not in name:
                setattr(sys.modules[_OURS], name, module)


def rest_of(name: str, *others: str) -> Callable[[str], Any]:
    """A module's `__getattr__` that hands on what else torch's module has, private names too.

    Args:
        name: the module in torch's package.
        others: where it lies in other releases.
    """
    module = theirs(name, *others)

    def __getattr__(attribute: str) -> Any:
        if attribute.startswith("__") or not hasattr(module, attribute):
            raise AttributeError(f"module '{_OURS}.{name}' has no attribute {attribute!r}")
        return getattr(module, attribute)

    return __getattr__
