"""Record the public names of the installed `torch.distributed.checkpoint`.

    python -m compat.names          # writes compat/names/RELEASE.json

Recording needs torch alone, not Shardkeep. `compat.names_page` compares the records with the names
of `shardkeep.dcp`.
"""

from __future__ import annotations

import argparse
import ast
import enum
import importlib
import inspect
import json
import logging
import pkgutil
import sys
import typing
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

STOCK, OURS = "torch.distributed.checkpoint", "shardkeep.dcp"
RECORDS = Path(__file__).with_suffix("")
USED = ("_consolidate_hf_safetensors", "_extension", "_fsspec_filesystem")
"""Modules that are private by name but imported by users."""


@dataclass(frozen=True)
class Name:
    """A public name.

    Attributes:
        kind: "class", "function" or "value".
        signature: the parameters as text.
        members: methods of a class, or members of an enumeration, with their signatures.
    """

    kind: str
    signature: str = ""
    members: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """The names of one release. The package itself is the module "" (`modules[""]`)."""

    torch: str
    python: str
    modules: Mapping[str, Mapping[str, Name]]
    private: tuple[str, ...]


def record() -> Record:
    """Return the names of the installed release."""
    import torch

    found = [one.name for one in pkgutil.iter_modules(importlib.import_module(STOCK).__path__)]
    public = sorted(name for name in found if name in USED or not name.startswith("_"))
    return Record(
        torch.__version__.partition("+")[0],
        f"{sys.version_info.major}.{sys.version_info.minor}",
        {name: names_of(module(STOCK, name)) for name in ["", *public]},
        tuple(sorted(set(found) - set(public))),
    )


def recorded() -> tuple[Record, ...]:
    """Return the recorded names of all releases, oldest first."""
    files = sorted(RECORDS.glob("*.json"), key=lambda file: [*map(int, file.stem.split("."))])
    return tuple(_read(json.loads(file.read_text())) for file in files)


def _read(saved: Any) -> Record:
    modules = {
        module: {name: Name(**how) for name, how in names.items()}
        for module, names in saved["modules"].items()
    }
    return Record(saved["torch"], saved["python"], modules, tuple(saved["private"]))


def write(made: Record) -> Path:
    path = RECORDS / f"{made.torch.rpartition('.')[0]}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(made), indent=1, sort_keys=True) + "\n")
    return path


def module(package: str, name: str) -> ModuleType:
    """Import a module of either package; "" is the package itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(f"{package}.{name}" if name else package)


def names_of(module: ModuleType) -> dict[str, Name]:
    """Return the public names of one of torch's modules."""
    return {name: describe(getattr(module, name)) for name in sorted(_public(module))}


_NO_NAMES = (ModuleType, logging.Logger, typing.TypeVar)
"""Values without an underscore that do not belong to a module's interface."""


def _public(module: ModuleType) -> Iterator[str]:
    """Yield the public names of a module: `__all__`, and what it defines without an underscore.

    For the package itself, yield all names without an underscore.
    """
    declared, assigned = getattr(module, "__all__", ()), _assigned(module)
    for name, value in vars(module).items():
        here = getattr(value, "__module__", None) == module.__name__ or module.__name__ == STOCK
        hidden = name.startswith("_") or value is None or isinstance(value, _NO_NAMES)
        if name in declared or ((here or name in assigned) and not hidden):
            yield name


def _assigned(module: ModuleType) -> set[str]:
    """Return the names that a module assigns, as constants do not record where they are defined."""
    names = set()
    for node in ast.parse(inspect.getsource(module)).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names.update(one.id for one in targets if isinstance(one, ast.Name))
    return names


def describe(value: Any) -> Name:
    """Return a description of a value; equal descriptions mean equal ways to call it."""
    if inspect.isclass(value):
        if issubclass(value, enum.Enum):
            return Name("enum", members={one.name: "" for one in value})
        members = {name: describe_member(value, name) for name in sorted(_members(value))}
        return Name("class", signature(value), members)
    if callable(value) and hasattr(value, "__code__"):
        return Name("function", signature(value))
    return Name("value")


def _members(kind: type) -> set[str]:
    """Return the public methods and properties of a class, inherited ones included."""
    of_torch = [
        one for one in kind.__mro__ if one.__module__.split(".")[0] in ("torch", "shardkeep")
    ]
    return {
        name
        for one in of_torch
        for name, value in vars(one).items()
        if not name.startswith("_")
        and (callable(value) or isinstance(value, (property, classmethod, staticmethod)))
    }


def describe_member(kind: type, name: str) -> str:
    if isinstance(inspect.getattr_static(kind, name), property):
        return "property"
    return signature(getattr(kind, name))


def signature(value: Any) -> str:
    """Return the parameters as text, such as `(state_dict, *, checkpoint_id=None)`."""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    plain = [
        one.replace(
            annotation=one.empty,
            default=one.empty if one.default is one.empty else _Text(one.default),
        )
        for one in found.parameters.values()
    ]
    return str(inspect.Signature(plain))


class _Text:
    """A default, printed in the same way in every process and release of Python."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        value = self.value
        if isinstance(value, enum.Enum):
            return f"{type(value).__name__}.{value.name}"
        if value is None or isinstance(value, (bool, int, float, str, bytes, tuple)):
            return repr(value)
        if type(value).__module__ == "torch" or value in ([], {}):  # dtypes, layouts
            return repr(value)
        return getattr(value, "__qualname__", None) or f"<{type(value).__qualname__}>"


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m compat.names", description=(__doc__ or "").partition("\n")[0]
    ).parse_args()
    print(write(record()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
