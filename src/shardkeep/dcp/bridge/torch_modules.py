"""Torch's own modules and names, under the names of `shardkeep.dcp`.

Users derive from the classes that planners, storage and metadata are made of, and compare them, so
these must be torch's own. A module of `torch.distributed.checkpoint` that Shardkeep does not
replace is therefore re-exported as the same module object, in whatever release is installed.
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

__all__ = ["forward_to_torch", "reexport_torch_modules", "torch_module"]

_TORCH_PACKAGE, _PACKAGE = stock.__name__, "shardkeep.dcp"
_REPLACED = frozenset(file.stem for file in Path(__file__).parent.parent.glob("*.py"))


def torch_module(*names: str) -> ModuleType | None:
    """Return the first of these modules of torch's package that this release has, or None."""
    for name in names:
        with suppress(ImportError):
            return importlib.import_module(f"{_TORCH_PACKAGE}.{name}")
    return None


def reexport_torch_modules() -> None:
    """Make each module of torch's that Shardkeep does not replace a module of this package."""
    for found in pkgutil.walk_packages(stock.__path__, f"{_TORCH_PACKAGE}."):
        name = found.name.removeprefix(f"{_TORCH_PACKAGE}.")
        if name in _REPLACED:
            continue
        with suppress(ImportError):  # Some modules need packages that are not installed.
            module = importlib.import_module(found.name)
            sys.modules[f"{_PACKAGE}.{name}"] = module
            if "." not in name:
                setattr(sys.modules[_PACKAGE], name, module)


def forward_to_torch(name: str, *others: str) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module that finds all other names in torch's module.

    Private names are found as well.

    Args:
        name: the module in torch's package.
        others: its names in other releases.
    """
    module = torch_module(name, *others)

    def __getattr__(attribute: str) -> Any:
        if attribute.startswith("__") or not hasattr(module, attribute):
            raise AttributeError(f"module '{_PACKAGE}.{name}' has no attribute {attribute!r}")
        return getattr(module, attribute)

    return __getattr__
