"""Conversion of a nested state into flat names and values, and back.

The names are those of DCP (torch 2.4 and later, `_traverse.py` and `_nested_dict.py`). Mappings
are always flattened. A list is flattened if it holds a tensor or a mapping, directly or inside
further lists. Everything else is a leaf, including tuples. A name consists of the keys of the
path as strings, joined by dots.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    Sequence,
)
from dataclasses import dataclass
from typing import Any, NamedTuple

from shardkeep.errors import Conflict, FormatError, Mismatch
from shardkeep.types import Path, Structure

__all__ = ["MAX_DEPTH", "Flat", "Leaf", "flatten", "get", "put", "show", "unflatten"]

MAX_DEPTH = 64
"""Limit for the nesting of containers, the same as for values and pickles."""

MAX_PADDING = 1_000_000
"""Limit for the missing entries of all lists together: a path may come from a hostile file."""

IsTensor = Callable[[Any], bool]


class Leaf(NamedTuple):
    """A value of a state that is not flattened any further, with its flat name and its path."""

    name: str
    path: Path
    value: Any


@dataclass(frozen=True, slots=True)
class Flat:
    """A flattened state.

    Attributes:
        values: the leaves, in the order of the state.
        structure: the names of the leaves, in the same order, and their nesting.
        legacy_duplicates: each outermost container without a tensor, as one value under its dotted
            name. Torch 2.3 and older save and look up such a container as one object. The root is
            never included, nor is a container that shares its name with a leaf or another
            container. These entries must be saved after all leaves.
    """

    values: Sequence[Any]
    structure: Structure
    legacy_duplicates: tuple[Leaf, ...]

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The leaves with their names and paths, in the order of the state."""
        named = self.structure.leaves.items()
        return tuple(Leaf(*item, value) for item, value in zip(named, self.values, strict=True))

    def items(self) -> Iterator[tuple[str, Any]]:
        """Return the flat name and the value of each leaf, in the order of the state."""
        return zip(self.structure.leaves, self.values, strict=True)


def show(path: Path) -> str:
    """Return a path as Python would index it: `['a'][0]`."""
    return "".join(f"[{key!r}]" for key in path) or "the state itself"


def flatten(state: Mapping[Any, Any], is_tensor: IsTensor, spread: Collection[Path] = ()) -> Flat:
    """Flatten a state into named leaves.

    Args:
        state: nested mappings and lists. Keys are str, int, bool, None, float, bytes, or tuples of
            these, and keep their type in paths.
        is_tensor: returns whether a value is a tensor of any kind, which must depend on its class
            only. Lists with tensors are flattened.
        spread: paths of containers whose entries are distributed over ranks. Neither these
            containers nor those around them have a legacy duplicate, but containers inside may.

    Raises:
        TypeError: `state` is not a mapping.
        Conflict: two leaves have the same name, a key has another type, a container contains
            itself, or more than `MAX_DEPTH` containers are nested.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"a state is a mapping of names to values, not a {type(state).__name__}")
    return _Flattening(is_tensor, spread).run(state)


class _Flattening:
    """State of one traversal."""

    def __init__(self, is_tensor: IsTensor, spread: Collection[Path]) -> None:
        self.is_tensor, self.spread = is_tensor, spread
        self.values: list[Any] = []
        self.paths: dict[str, Path] = {}
        self.containers: dict[Path, str] = {}
        self.empties: dict[Path, int] = {}
        self.parents: tuple[list[int], list[int]] = ([], [])
        self.legacy_duplicates: list[Leaf] = []
        self.names: list[str] = []
        """Names of all containers but the root."""
        self.kinds: dict[type, bool] = {}
        """Class of a leaf -> whether it is a tensor class. A look-up is faster than isinstance."""
        self.verdicts: dict[int, tuple[Any, bool]] = {}
        self.around: set[int] = set()

    def run(self, state: Mapping[Any, Any]) -> Flat:
        self.container(0, (), "", state)
        counts = Counter(self.names) if self.legacy_duplicates else {}
        legacy_duplicates = tuple(
            Leaf(name, path, _plain(value, self.containers, path))
            for name, path, value in self.legacy_duplicates
            if name not in self.paths and counts[name] == 1
        )
        structure = Structure(self.paths, self.containers, self.empties, self.parents)
        return Flat(self.values, structure, legacy_duplicates)

    def container(self, parent: int, path: Path, name: str, value: Any) -> bool:
        """Flatten a container, and return whether it holds a tensor."""
        if len(path) >= MAX_DEPTH:
            raise _too_deep(path)
        if id(value) in self.around:
            raise Conflict(f"the container at {show(path)} holds itself")
        self.around.add(id(value))
        kind = "dict" if type(value) is dict else _kind(value)
        row, leaves = len(self.containers), len(self.values)
        self.containers[path] = kind
        if path:
            self.names.append(name)
            self.parents[0].append(parent)
        entries = enumerate(value) if kind == "list" else value.items()
        tensor, bare = self.entries(row, path, f"{name}." if path else "", entries)
        if (row + 1, leaves) == (len(self.containers), len(self.values)):
            self.empties[path] = leaves
        tensor = tensor or path in self.spread
        if tensor or not path:
            self.legacy_duplicates += bare
        self.around.remove(id(value))
        return tensor

    def entries(
        self, row: int, path: Path, prefix: str, entries: Iterable[tuple[Any, Any]]
    ) -> tuple[bool, list[Leaf]]:
        """Flatten entries; return whether any is a tensor, and the containers without a tensor."""
        values, paths, kinds, parents = self.values, self.paths, self.kinds, self.parents[1]
        tensor, bare = False, []
        for key, entry in entries:
            full = prefix + key if type(key) is str else f"{prefix}{_checked(key, path)}"
            below = (*path, key)
            known = kinds.get(type(entry))
            if known is None:
                if type(entry) is dict or self.opens(entry, below):
                    if self.container(row, below, full, entry):
                        tensor = True
                    else:
                        bare.append(Leaf(full, below, entry))
                    continue
                known = self.learn(entry)
            if full in paths:
                raise _clash(paths[full], below, full)
            paths[full] = below
            values.append(entry)
            parents.append(row)
            if known:
                tensor = True
        return tensor, bare

    def opens(self, value: Any, path: Path) -> bool:
        """Return whether a value is flattened."""
        return isinstance(value, Mapping) or self.walks(value, path)

    def learn(self, leaf: Any) -> bool:
        """Return whether a leaf is a tensor, and remember it if that depends on the class only."""
        tensor, kind = self.is_tensor(leaf), type(leaf)
        if leaf.__class__ is kind and not isinstance(leaf, list):
            self.kinds[kind] = tensor
        return tensor

    def walks(self, value: Any, path: Path) -> bool:
        """Return whether DCP flattens this value as a list. Each list is searched only once."""
        if not isinstance(value, list):
            return False
        known = self.verdicts.get(id(value))
        if known is not None:
            return known[1]
        inside: dict[int, tuple[Any, Iterator[Any]]] = {id(value): (value, iter(value))}
        while inside:
            here, entries = next(reversed(inside.values()))
            for entry in entries:
                if isinstance(entry, list):
                    if id(entry) in inside:
                        raise Conflict(f"a list inside {show(path)} holds itself")
                    known = self.verdicts.get(id(entry))
                    if known is None:
                        inside[id(entry)] = (entry, iter(entry))
                        if len(path) + len(inside) > MAX_DEPTH:
                            raise _too_deep(path)
                        break
                    found = known[1]
                else:
                    found = isinstance(entry, Mapping) or self.is_tensor(entry)
                if found:
                    self.verdicts |= {key: (seen, True) for key, (seen, _) in inside.items()}
                    return True
            else:
                self.verdicts[id(here)] = (here, False)
                del inside[id(here)]
        return False


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "OrderedDict" if isinstance(value, OrderedDict) else "dict"
    return "list"


def _checked(key: Any, path: Path) -> Any:
    parts = [] if type(key) is str else [key]
    while parts:
        part = parts.pop()
        if type(part) is tuple:
            parts += part
        elif type(part) not in (str, int, bool, type(None), float, bytes) or (
            type(part) is float and math.isnan(part)
        ):
            raise Conflict(
                f"key {key!r} of {show(path)} is a {type(part).__name__}: keys are str, int, bool, "
                "None, float (not NaN), bytes, or tuples of these"
            )
    return key


def _clash(one: Path, other: Path, name: str) -> Conflict:
    return Conflict(
        f"{show(one)} and {show(other)} would both be saved under the name {name!r}; "
        "rename one of them"
    )


def _too_deep(path: Path) -> Conflict:
    return Conflict(f"more than {MAX_DEPTH} containers are nested below {show(path[:3])}")


def _plain(value: Any, containers: Mapping[Path, str], path: Path) -> Any:
    """Return `value` with plain dicts and lists in place of the containers that were flattened.

    The recursion is at most `MAX_DEPTH` deep.
    """
    kind = containers.get(path)
    if kind is None:
        return value
    if kind == "list":
        return [_plain(entry, containers, (*path, i)) for i, entry in enumerate(value)]
    made = OrderedDict[Any, Any]() if kind == "OrderedDict" else dict[Any, Any]()
    for key, entry in value.items():
        made[key] = _plain(entry, containers, (*path, key))
    return made


class _Hole:
    """Placeholder for an entry of a list that has not been set."""


_HOLE = _Hole()


def unflatten(structure: Structure, value: Callable[[str], Any] | Mapping[str, Any]) -> Any:
    """Return the nested state for a structure, with its containers, order and key types.

    Args:
        structure: the names and their nesting, which may come from a file. Missing entries of lists
            become None.
        value: returns the value of a flat name, or maps names to values.

    Raises:
        FormatError: the structure contradicts itself.
        KeyError: `value` is a mapping that lacks a name.
    """
    look_up = value.__getitem__ if isinstance(value, Mapping) else value
    made: dict[Path, Any] = {}
    padding = 0

    def place(path: Path, thing: Any) -> None:
        nonlocal padding
        holder = container(path[:-1])
        key = path[-1]
        if isinstance(holder, list):
            if type(key) is not int or key < 0:
                raise FormatError(f"{show(path)} is not a valid index of a list")
            missing = key + 1 - len(holder)
            padding += max(0, missing - 1)
            if padding > MAX_PADDING:
                raise FormatError(f"lists lack more than {MAX_PADDING} entries, at {show(path)}")
            holder += [_HOLE] * max(0, missing)
            if holder[key] is not _HOLE:
                raise FormatError(f"two entries are at {show(path)}")
        elif key in holder:
            raise FormatError(f"two entries are at {show(path)}")
        holder[key] = thing

    def container(path: Path) -> Any:
        """Return the container at a path, and create it and those around it if needed."""
        for depth in range(len(path), -1, -1):
            if path[:depth] in made:
                break
        else:
            depth = -1
        for length in range(depth + 1, len(path) + 1):
            here = path[:length]
            made[here] = _new(structure.containers.get(here), here)
            if here:
                place(here, made[here])
        return made[path]

    container(())
    empties = iter(sorted(structure.empties.items(), key=lambda item: item[1]))
    empty = next(empties, None)
    for count, (name, path) in enumerate(structure.leaves.items()):
        while empty is not None and empty[1] <= count:
            container(empty[0])
            empty = next(empties, None)
        if not path:
            raise FormatError(f"{name!r} has an empty path, which is that of the state itself")
        place(path, look_up(name))
    while empty is not None:
        container(empty[0])
        empty = next(empties, None)
    for path in structure.containers:
        container(path)
    if padding:
        _fill(made)
    return made[()]


def _new(kind: str | None, path: Path) -> Any:
    if len(path) > MAX_DEPTH:
        raise FormatError(f"more than {MAX_DEPTH} containers are nested below {show(path[:3])}")
    if kind == "dict":
        return {}
    if kind == "list":
        return []
    if kind == "OrderedDict":
        return OrderedDict()
    problem = "not a container" if kind is None else f"a container of unknown kind {kind!r}"
    raise FormatError(f"{show(path)} is {problem}")


def _fill(made: Mapping[Path, Any]) -> None:
    for one in made.values():
        if isinstance(one, list):
            one[:] = [None if entry is _HOLE else entry for entry in one]


def get(state: Any, path: Path) -> Any:
    """Return the value at a path. Raise Mismatch if there is none."""
    for depth, key in enumerate(path):
        if isinstance(state, Mapping):
            if key not in state:
                raise Mismatch(f"there is no {show(path[: depth + 1])}")
        elif not isinstance(state, list):
            raise Mismatch(f"{show(path[:depth])} is a {type(state).__name__}, not a container")
        elif type(key) is not int or not 0 <= key < len(state):
            raise Mismatch(f"there is no {show(path[: depth + 1])} in a list of {len(state)}")
        state = state[key]
    return state


def put(state: Any, path: Path, value: Any) -> None:
    """Set the value at a path, in place. Lists are extended with None as needed.

    Raises:
        Mismatch: a container on the path is missing, or is immutable (such as a tuple).
    """
    if not path:
        raise Mismatch("the state itself cannot be replaced in place")
    holder, key = get(state, path[:-1]), path[-1]
    if isinstance(holder, MutableMapping):
        holder[key] = value
        return
    if not isinstance(holder, MutableSequence) or isinstance(holder, bytearray):
        kind = type(holder).__name__
        raise Mismatch(f"{show(path)} cannot be set: {show(path[:-1])} is a {kind}")
    if type(key) is not int or not 0 <= key < len(holder) + MAX_PADDING:
        raise Mismatch(f"{show(path)} is not a valid index of a list of {len(holder)}")
    holder.extend([None] * (key + 1 - len(holder)))
    holder[key] = value
