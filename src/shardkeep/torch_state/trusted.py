"""Classes that the caller trusts by name, which are imported and built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

from shardkeep.errors import Mismatch
from shardkeep.format.pickle.registry import Builder, Reference, Registry
from shardkeep.torch_state.builders import TORCH_BUILDERS

__all__ = ["TrustedClasses"]


class TrustedClasses:
    """The classes and functions that may be imported for one object.

    Args:
        name: the object's name, for errors.
        trust: names such as "module.Class", or "module.*" for everything directly in that module.

    Raises:
        TypeError: `trust` is a single string.
    """

    def __init__(self, name: str, trust: Sequence[str]) -> None:
        if isinstance(trust, str):
            raise TypeError(f"trust must be a list of names, such as [{trust!r}], not a string")
        self._name = name
        self._trust = frozenset(trust)
        self._real: dict[str, Any] = {}

    def covers(self, full_name: str) -> bool:
        """Return whether the class with this full name is trusted."""
        module, _, _ = full_name.rpartition(".")
        return full_name in self._trust or f"{module}.*" in self._trust

    def builders(self, names: Iterable[str]) -> Registry:
        """Import these classes, and return builders that include them.

        Raises:
            Mismatch: a class cannot be imported.
        """
        self._real |= {name: self._imported(name) for name in names}
        return Registry({**TORCH_BUILDERS, **{name: self._builder(name) for name in names}})

    def resolve(self, value: Any) -> Any:
        """Return a value with each reference to a trusted class or function replaced by it."""
        if type(value) is Reference and value.name in self._real:
            return self._real[value.name]
        if type(value) is list:
            value[:] = map(self.resolve, value)
        elif type(value) is dict:
            for key, inner in value.items():
                value[key] = self.resolve(inner)
        elif type(value) is tuple:
            return tuple(map(self.resolve, value))
        return value

    def _imported(self, full_name: str) -> Any:
        parts = full_name.split(".")
        for split in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:split])
            try:
                found: Any = import_module(module)
            except ModuleNotFoundError as error:
                # The module exists, but one that it imports does not: show that error.
                if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                    raise self._failed(full_name, error) from error
                continue
            try:
                for part in parts[split:]:
                    found = getattr(found, part)
            except AttributeError as error:
                raise self._failed(full_name, error) from error
            return found
        raise self._failed(full_name, ModuleNotFoundError(parts[0]))

    def _failed(self, full_name: str, error: Exception) -> Mismatch:
        return Mismatch(f"object {self._name!r} needs {full_name}: {type(error).__name__}: {error}")

    def _builder(self, full_name: str) -> Builder:
        real = self._real[full_name]
        if not isinstance(real, type):
            return Builder(make=self._caller(full_name, real))
        return Builder(
            make=self._caller(full_name, real),
            new=self._caller(
                full_name, lambda *args, **kwargs: real.__new__(real, *args, **kwargs)
            ),
            type=real,
            fill=self._state_setter(full_name),
            takes="list" if issubclass(real, list) else "dict" if issubclass(real, dict) else "",
            key=real.__hash__ is not None,
        )

    def _caller(self, full_name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            try:
                return real(*self.resolve(args), **self.resolve(kwargs))
            except Exception as error:
                raise self._failed(full_name, error) from error

        return make

    def _state_setter(self, full_name: str) -> Callable[[Any, Any], None]:
        def fill(value: Any, state: Any) -> None:
            try:
                _set_state(value, self.resolve(state))
            except Exception as error:
                raise self._failed(full_name, error) from error

        return fill


def _set_state(value: Any, state: Any) -> None:
    """Set an object's state as pickle does: by `__setstate__`, or in `__dict__` and slots."""
    own = getattr(value, "__setstate__", None)
    if own is not None:
        own(state)
        return
    plain, slots = state if type(state) is tuple and len(state) == 2 else (state, None)
    if plain:
        value.__dict__.update(plain)
    for name, inner in (slots or {}).items():
        setattr(value, name, inner)
