"""What a state says of a value: each rank has its own (`PerRank`), or all the same (`Replicated`).

A rank's own value is stored below the place where it stands, as an entry whose key names the rank:
`rng` becomes `rng.rank_0_of_4`. To every reader these are ordinary entries of a mapping.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shardkeep.errors import Conflict
from shardkeep.state.flatten import MAX_DEPTH, Flat, IsTensor, flatten, show
from shardkeep.types import Path

__all__ = ["PerRank", "Replicated", "Unwrapped", "has_state", "key_of", "sizes_below", "unmarked"]

_KEY = re.compile(r"rank_(\d{1,9})_of_(\d{1,9})")


@dataclass(slots=True, eq=False)
class PerRank:
    """A value of which each rank has its own: RNG states, the position of a data loader.

    A load gives each rank what it saved, and puts it into `value`. On another number of ranks a
    policy decides (`load(per_rank=...)`); by default that is an error.

    Args:
        value: any leaf, a nested mapping or list, or something with `state_dict` and
            `load_state_dict`, which stands for its state.
    """

    value: Any


@dataclass(slots=True, eq=False)
class Replicated:
    """A value that is the same on all ranks that have it: a save refuses replicas that differ.

    Comparing takes a checksum of each tensor in it. What is not marked is taken on trust: one
    rank's tensor is saved, as only objects that stand in the manifest are always compared.

    Args:
        value: as of `PerRank`. Of a tensor that is spread over ranks, what several of them hold is
            compared.
    """

    value: Any


_MARKS = (PerRank, Replicated)


def key_of(rank: int, size: int) -> str:
    """The key of a rank's own value, among so many ranks."""
    return f"rank_{rank}_of_{size}"


def sizes_below(names: Iterable[str], place: str) -> frozenset[int]:
    """How many ranks each saved their own value under that dotted name; none if that is not so."""
    prefix = f"{place}."
    keys = {name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}
    return frozenset(int(found[2]) for found in map(_KEY.fullmatch, keys) if found)


def has_state(value: Any) -> bool:
    """Whether a value has a state that stands for it, as in DCP."""
    # Not in a loop: asked of every leaf at the top level.
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    )


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """A state without marks.

    Attributes:
        state: plain mappings, lists and leaves; what holds no mark is the very same object.
        marks: where there was one -> "PerRank" or "Replicated".
    """

    state: Mapping[Any, Any]
    marks: Mapping[Path, str] = field(default_factory=dict)
    _copies: Mapping[int, tuple[Any, Any]] = field(default_factory=dict)
    """Identity of each copied container -> what it is a copy of, and itself."""

    def places(self, kind: str) -> frozenset[Path]:
        """Where there was a mark of that kind."""
        return frozenset(path for path, found in self.marks.items() if found == kind)

    def put_back(self) -> None:
        """After a load into `state`: put what came into the marks, and into the original."""
        for original, copy in self._copies.values():
            for key, before in _entries(original):
                now = copy[key]
                if isinstance(before, PerRank):
                    for mine in now.values():  # none, if there was nothing to load
                        _give(before, mine)
                elif isinstance(before, Replicated):
                    _give(before, now)
                elif now is not before and id(now) not in self._copies:
                    original[key] = now


def _give(mark: PerRank | Replicated, value: Any) -> None:
    if has_state(mark.value):
        mark.value.load_state_dict(value)
    else:
        mark.value = value


def unmarked(
    state: Mapping[Any, Any], is_tensor: IsTensor, key: Callable[[Path], str | None]
) -> tuple[Flat, Unwrapped]:
    """Take the marks out of a state, at any depth of its mappings and lists, and flatten it.

    Args:
        state: is not changed; containers that hold a mark are copied.
        is_tensor: as of `tree.flatten`.
        key: the key of this rank's own value at a place; None leaves an empty mapping there.

    Raises:
        Conflict: a mark is inside another one; and as `tree.flatten`.
    """
    # Few states have marks, so it is the leaves that are looked at, not all containers once more.
    flat = flatten(state, lambda value: is_tensor(value) or isinstance(value, _MARKS))
    if not any(issubclass(kind, _MARKS) for kind in set(map(type, flat.values))):
        return flat, Unwrapped(state)
    walk = _Walk(key)
    found = Unwrapped(walk.container(state, ()), walk.marks, walk.copies)
    return flatten(found.state, is_tensor, found.places("PerRank")), found


class _Walk:
    def __init__(self, key: Callable[[Path], str | None]) -> None:
        self._key = key
        self._around: set[int] = set()
        self._mark: tuple[str, Path] | None = None
        self.marks: dict[Path, str] = {}
        self.copies: dict[int, tuple[Any, Any]] = {}

    def container(self, value: Any, path: Path) -> Any:
        """The same without marks: itself, if there are none in it.

        What nests too deeply, or holds itself, is left to `tree.flatten`, which refuses it.
        """
        if len(path) >= MAX_DEPTH or id(value) in self._around:
            return value
        self._around.add(id(value))
        changed = {}
        for key, entry in _entries(value):
            plain = self.entry(entry, (*path, key))
            if plain is not entry:
                changed[key] = plain
        self._around.remove(id(value))
        if not changed:
            return value
        copy = _copy(value)
        for key, plain in changed.items():
            copy[key] = plain
        self.copies[id(copy)] = value, copy
        return copy

    def entry(self, value: Any, path: Path) -> Any:
        if not isinstance(value, _MARKS):
            return self.container(value, path) if _is_container(value) else value
        kind = type(value).__name__
        if self._mark is not None:
            outer, place = self._mark
            raise Conflict(f"{show(path)} is {kind} inside the {outer} value at {show(place)}")
        self._mark = kind, path
        self.marks[path] = kind
        inner = value.value.state_dict() if has_state(value.value) else value.value
        plain = self.entry(inner, path)
        self._mark = None
        if isinstance(value, Replicated):
            return plain
        key = self._key(path)
        return {} if key is None else {key: plain}


def _is_container(value: Any) -> bool:
    return isinstance(value, Mapping | list)


def _entries(container: Any) -> Iterator[tuple[Any, Any]]:
    return iter(container.items() if isinstance(container, Mapping) else enumerate(container))


def _copy(container: Any) -> Any:
    if isinstance(container, OrderedDict):
        return OrderedDict(container)
    return dict(container) if isinstance(container, Mapping) else list(container)
