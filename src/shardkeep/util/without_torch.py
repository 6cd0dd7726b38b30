"""Stand-ins for the public names that need torch, where torch is not installed.

`help`, `inspect` and documentation tools look at every public name. They must work without torch,
so the docstring and the signature of a stand-in are taken from the source of the original.
"""

from __future__ import annotations

import ast
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["missing_torch", "needs_torch", "stand_in", "stand_in_module"]


def missing_torch(name: str) -> ModuleNotFoundError:
    """Return the error that says that `name` needs torch, and how to install it."""
    message = f"{name} needs torch, which is not installed: pip install 'shardkeep[torch]'"
    return ModuleNotFoundError(message, name="torch")


def needs_torch(name: str) -> None:
    """Raise a ModuleNotFoundError for a call of `name` if torch is not installed."""
    if find_spec("torch") is None:
        raise missing_torch(name)


def stand_in(module: str, name: str) -> Any:
    """Return a stand-in for a function or a class of a module that imports torch.

    It has the docstring and the signature of the original. Calling it raises `missing_torch`.

    Args:
        module: full name of the module that defines it; its package must not need torch.
        name: name of the function or class.
    """
    node = _definition(module, name)
    if isinstance(node, ast.ClassDef):
        return type(name, (), {**_about(node, module), "__init__": _refuse(f"shardkeep.{name}")})
    namespace: dict[str, Any] = {"__name__": module, "_missing_torch": missing_torch}
    docstring = node.body[:1] if ast.get_docstring(node) else []
    refuse = ast.parse(f"raise _missing_torch('shardkeep.{name}')").body
    node.body, node.decorator_list = [*docstring, *refuse], []
    annotations = ast.parse("from __future__ import annotations").body
    code = ast.Module(body=[*annotations, node], type_ignores=[])
    exec(compile(code, f"<{module}>", "exec"), namespace)  # noqa: S102 - our own source
    return namespace[name]


def stand_in_module(module: str) -> ModuleType:
    """Return a stand-in for a package that imports torch; its names raise `missing_torch`."""
    made = _Module(module, ast.get_docstring(_parse(module)))
    made.__spec__ = ModuleSpec(module, None)
    return made


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # attributes that inspect, copy and pickle look up
            raise AttributeError(name)
        raise missing_torch(f"{self.__name__}.{name}")


def _refuse(name: str) -> Any:
    def __init__(self: object, *args: object, **kwargs: object) -> None:
        raise missing_torch(name)

    return __init__


def _about(node: ast.ClassDef, module: str) -> dict[str, Any]:
    return {"__doc__": ast.get_docstring(node), "__module__": module}


def _definition(module: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    for node in _parse(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
    raise AttributeError(f"module {module!r} defines no {name!r}")


def _parse(module: str) -> ast.Module:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
