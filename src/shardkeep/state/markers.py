"""Markers in a state: each rank has its own value (`PerRank`), or all have the same (`Replicated`).

The value of one rank is stored as an entry with the rank in its key, below the path of the
marker: `rng` becomes `rng.rank_0_of_4`. For readers these are ordinary entries of a mapping.
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
    """A value that differs between ranks, such as an RNG state or the position of a data loader.

    A save stores the value of each rank. A load puts the value that this rank saved into `value`.
    If the number of ranks has changed, `load(per_rank=...)` decides; by default, the load fails.

    Args:
        value: a leaf, a nested mapping or list, or an object with the methods `state_dict` and
            `load_state_dict`, whose state is saved and loaded.

    Example:
        >>> state = {"model": model, "rng": sk.PerRank(torch.get_rng_state())}
        >>> sk.save(state, "run/step_100")
    """

    value: Any


@dataclass(slots=True, eq=False)
class Replicated:
    """A value that must be the same on all ranks that have it; a save refuses replicas that differ.

    A save computes a checksum of each tensor in the value, and compares the checksums of all ranks.
    A tensor without this marker is not compared: the replica of one rank is saved. Small objects
    are always compared.

    Args:
        value: a leaf, a nested mapping or list, or an object with the methods `state_dict` and
            `load_state_dict`, whose state is saved and loaded. If a tensor is sharded, only shards
            that several ranks hold are compared.

    Example:
        >>> state = {"model": sk.Replicated(model), "step": 100}
        >>> sk.save(state, "run/step_100")
    """

    value: Any


_MARKS = (PerRank, Replicated)


def key_of(rank: int, size: int) -> str:
    """Return the key of a rank's own value among `size` ranks."""
    return f"rank_{rank}_of_{size}"


def sizes_below(names: Iterable[str], place: str) -> frozenset[int]:
    """Return the numbers of ranks for which per-rank values are stored below a dotted name."""
    prefix = f"{place}."
    keys = {name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}
    return frozenset(int(found[2]) for found in map(_KEY.fullmatch, keys) if found)


def has_state(value: Any) -> bool:
    """Return whether a value is saved as its `state_dict`, as in DCP."""
    # No loop, because this is called for every leaf at the top level.
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    )


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """A state from which the markers were removed.

    Attributes:
        state: mappings, lists and leaves. Parts without a marker are the original objects.
        marks: path of each marker -> "PerRank" or "Replicated".
    """

    state: Mapping[Any, Any]
    marks: Mapping[Path, str] = field(default_factory=dict)
    _copies: Mapping[int, tuple[Any, Any]] = field(default_factory=dict)
    """Identity of each copied container -> the original and the copy."""

    def places(self, kind: str) -> frozenset[Path]:
        """Return the paths of all markers of a kind."""
        return frozenset(path for path, found in self.marks.items() if found == kind)

    def put_back(self) -> None:
        """Put the values loaded into `state` into the markers and the original containers."""
        for original, copy in self._copies.values():
            for key, before in _entries(original):
                now = copy[key]
                if isinstance(before, PerRank):
                    for mine in now.values():  # empty if there was nothing to load
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
    """Remove the markers from a state, at any depth of its mappings and lists, and flatten it.

    Args:
        state: the state, which is not changed. Containers that hold a marker are copied.
        is_tensor: returns whether a value is a tensor of any kind.
        key: returns the key of this rank's own value at a path. If it returns None, an empty
            mapping takes the place of the value.

    Raises:
        TypeError: `state` is not a mapping.
        Conflict: a marker is inside another one, two leaves have the same name, a key has a type
            that cannot be stored, a container contains itself, or containers are nested too deeply.
    """
    # Few states have markers. To look for them among the leaves saves a second traversal.
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
        """Return the container without markers: the container itself if it has none.

        Containers that are nested too deeply or contain themselves are returned as they are, since
        `flatten` refuses them.
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
